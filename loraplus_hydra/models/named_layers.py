"""Names in an adapter's config that fit nothing of the model, which PEFT passes over."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists

from loraplus_hydra.errors import Problem, first_of, nearest
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME

_LAYER, _ADAPTED = "no layer of this model", "no adapted layer"
_SHOWN = 12  # names of layers


def unmatched_problems(given: PeftConfig, adapted: PeftModel, layers: Iterable[str]) -> list[Problem]:
    """Return a Problem for each name, pattern or number of `given` that fits nothing, by PEFT's own rules.

    `given` is the config before PEFT changed it, `adapted` the model that PEFT made with it, and `layers` the names of
    layers that can be adapted.
    """
    names = [name for name, _ in adapted.get_base_model().named_modules(remove_duplicate=False)]
    parameters = list(getattr(adapted.base_model, "targeted_parameter_names", ()))
    targeted = [*getattr(adapted.base_model, "targeted_module_names", ()), *parameters]
    fields: dict[str, tuple[Callable[[str, str], Any], list[str], str]] = {
        "target_modules": (_is_end, names, _LAYER),
        "exclude_modules": (_is_end, names, _LAYER),
        "modules_to_save": (lambda entry, name: name.endswith(entry), names, _LAYER),
        "target_parameters": (_is_end, parameters, "no parameter of this model"),
        "rank_pattern": (_is_pattern_of_end, targeted, _ADAPTED),
        "alpha_pattern": (_is_pattern_of_end, targeted, _ADAPTED),
    }
    fix = f"this model has the layers {first_of(list(layers), _SHOWN)}"
    problems = []
    for field, (fits, candidates, nothing) in fields.items():
        for entry in _entries(given, field):
            if not any(fits(entry, name) for name in candidates):
                near = nearest(entry, {_last_parts(name, entry.count(".") + 1) for name in candidates} - {entry})
                problems.append(Problem(f"adapter.{field}", f"'{entry}' fits {nothing}{near}", fix))
    excluded = getattr(given, "exclude_modules", None)
    if isinstance(excluded, str) and excluded and not any(re.fullmatch(excluded, name) for name in names):
        problems.append(Problem("adapter.exclude_modules", f"'{excluded}' fits {_LAYER}", fix))
    key, config = "layers_to_transform", copy.copy(adapted.peft_config[ADAPTER_NAME])
    for number in _entries(given, key):
        setattr(config, key, [int(number)])
        if not any(check_target_module_exists(config, name) for name in targeted):
            what = f"{_ADAPTED} has the number {number}"
            problems.append(Problem(f"adapter.{key}", what, "leave it out; the numbers begin with 0"))
    return problems


def _entries(config: PeftConfig, field: str) -> Iterator[str]:
    """Yield a field's names, patterns or numbers, as text. A single pattern is left out."""
    value = getattr(config, field, None)
    if isinstance(value, int):
        yield str(value)
    elif isinstance(value, (list, tuple, set, dict)):
        yield from sorted(map(str, value))


def _is_end(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _is_pattern_of_end(entry: str, name: str) -> Any:
    return re.match(rf"(.*\.)?({entry})$", name)


def _last_parts(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])
