"""Nested mappings as one level: the names on the way joined to one key, as in `optimizer.lr`; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(nested: Mapping[Any, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """{"lr": {"groupA": 0.1}} -> {"lr.groupA": 0.1}; an empty mapping stays, as a value."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            found[f"{prefix}{key}"] = value
    return found
