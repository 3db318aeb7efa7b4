"""Values of a stored config or result, however broken: interpolations, dotted keys and numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.config.flatten import flat

_HUGE = 1e100
_RESOLVERS = re.compile(r"\$\{\s*[\w.]+\s*:")  # ${oc.env:...}: a stored config is read, never run


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """A composed config with its interpolations followed; as it stands where one leads nowhere or calls a resolver."""
    if _RESOLVERS.search(json.dumps(config, default=str)):
        return config
    try:
        value = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=False)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return config
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else config


def flatten(config: Mapping[Any, Any]) -> dict[str, Any]:
    """A nested mapping as dotted key -> leaf. A list is one leaf; interpolations that nobody followed are left out."""
    return {
        key: json.dumps(value, default=str) if isinstance(value, (list, dict)) else value
        for key, value in flat(config).items()
        if not (isinstance(value, str) and value.startswith("${"))
    }


def number(value: Any) -> float | None:
    """`value` as a number whose square is finite too, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _HUGE else None  # NaN is never smaller


def whole(value: Any) -> int | None:
    """`value` as a whole number, or None."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None
