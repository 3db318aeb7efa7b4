"""The run's config that no override changes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import register


@cache
def default_run() -> DictConfig:
    """Return the config of a run without overrides."""
    register()
    # Hydra composes for one app at a time.
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            return compose("run")
    finally:
        GlobalHydra.instance().hydra = running  # the context has made a new instance


def changed_part(config: DictConfig) -> dict[str, Any]:
    """Return the part of a run's config whose values differ from those of a run without overrides.

    A value that follows another key, by an interpolation, is not changed.
    """
    # A stored config has values in the place of interpolations.
    defaults = [plain_of(default_run(), resolve=resolve) for resolve in (False, True)]
    return _part(plain_of(config, resolve=False), plain_of(config), defaults)


def _part(raw: Mapping[str, Any], values: Mapping[str, Any], defaults: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in raw.items():
        beside = [default[key] for default in defaults if isinstance(default, Mapping) and key in default]
        if isinstance(value, Mapping) and value:
            if inner := _part(value, values[key], beside):
                found[key] = inner
        elif value not in beside:
            found[key] = values[key]
    return found
