"""Regular expressions in an adapter's config, tried with a time limit before PEFT uses them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft import PeftConfig
from torch import nn

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.time_limit import TooSlowError, time_limit

_SECONDS = 5.0


def refuse_slow_patterns(config: PeftConfig, model: nn.Module) -> None:
    """Raise UserError for a pattern that is invalid or takes seconds to match the layers' names."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for field, pattern in _patterns(config):
        try:
            with time_limit(_SECONDS):
                compiled = re.compile(pattern)
                for name in names:
                    compiled.fullmatch(name)
        except (TooSlowError, re.error, RecursionError, OverflowError) as error:
            raise UserError(f"the adapter's {field} can't be matched with the model's layers: {error}") from None


def _patterns(config: PeftConfig) -> Iterator[tuple[str, str]]:
    """Yield (field, pattern); the pattern has the form in which PEFT uses it."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, field, None), str):
            yield field, value
    for field in ("rank_pattern", "alpha_pattern"):
        if isinstance(value := getattr(config, field, None), dict):
            yield from ((field, rf"(.*\.)?({key})$") for key in value)
    layers = getattr(config, "layers_pattern", None) or []
    for value in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", rf".*\.{value}\.(\d+)\..*"
