"""The run's config that no override changes."""

from __future__ import annotations

from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.plain import flat, plain_of
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


def changed_keys(config: DictConfig) -> set[str]:
    """Return the dotted keys of a run's config whose values differ from those of a run without overrides.

    A value that follows another key, by an interpolation, is not changed.
    """
    # A stored config has values in the place of interpolations.
    defaults = [flat(plain_of(default_run(), resolve=resolve)).items() for resolve in (False, True)]
    return {
        key
        for key, value in flat(plain_of(config, resolve=False)).items()
        if not any((key, value) in items for items in defaults)
    }
