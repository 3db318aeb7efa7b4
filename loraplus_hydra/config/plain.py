"""Configs as plain mappings, nested or as one level with dotted keys (`optimizer.lr`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def plain_of(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """Return a config as plain containers. Interpolations are resolved, or kept as text."""
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def plain_at(config: DictConfig, key: str, *, resolve: bool = True) -> Any:
    """Return the value of a dotted key as plain containers. None if there is none."""
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=resolve) if OmegaConf.is_config(value) else value


def value_at(nested: Mapping[Any, Any], key: str) -> Any:
    """Return the value of a dotted key in a plain mapping. None if there is none."""
    value: Any = nested
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def flat(nested: Mapping[Any, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return {"lr.groupA": 0.1} for {"lr": {"groupA": 0.1}}. An empty mapping is kept as a value."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            found[f"{prefix}{key}"] = value
    return found


def without_credentials(value: Any) -> Any:
    """Return a config's value, or a text, whose addresses have no user and password."""
    if isinstance(value, Mapping):
        return {without_credentials(key): without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    return _CREDENTIALS.sub("", value) if isinstance(value, str) else value
