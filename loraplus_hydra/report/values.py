"""Tolerant access to values of a stored config or result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.config.plain import flat
from loraplus_hydra.io.read import RESOLVER

_HUGE = 1e100


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """Resolve a config's interpolations; return it unchanged if one fails or calls a resolver."""
    if RESOLVER.search(json.dumps(config, default=str)):
        return config
    try:
        value = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=False)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return config
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else config


def flatten(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a mapping as dotted key -> leaf, without unresolved interpolations.

    A list is one leaf, as JSON.
    """
    return {
        key: json.dumps(value, default=str) if isinstance(value, (list, dict)) else value
        for key, value in flat(config).items()
        if not (isinstance(value, str) and value.startswith("${"))
    }


def number(value: Any) -> float | None:
    """Return `value` as a float, or None if it is no usable number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _HUGE else None  # also None for NaN, which is never smaller


def whole_number(value: Any) -> int | None:
    """Return `value` as an int, or None if it is no whole number."""
    as_float = number(value)
    return int(as_float) if as_float is not None and as_float == int(as_float) else None
