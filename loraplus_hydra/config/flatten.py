"""Nested mappings as one level with dotted keys, as in `optimizer.lr`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(nested: Mapping[Any, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return {"lr.groupA": 0.1} for {"lr": {"groupA": 0.1}}. An empty mapping is kept as a value."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            found[f"{prefix}{key}"] = value
    return found
