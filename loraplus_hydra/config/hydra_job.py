"""Hydra's facts about the current job, and the quoting of values for Hydra."""

from __future__ import annotations

import re
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.errors import ConfigErrors, Problem, first_line


def is_sweep(hydra: Any) -> bool:
    """Return True if `hydra` is the Hydra node of a sweep or of a sweep's job."""
    return getattr(hydra.mode, "name", hydra.mode) == "MULTIRUN"


def number_in_sweep() -> int | None:
    """Return the current job's number in its sweep, from 0; None outside a sweep."""
    hydra: Any = HydraConfig.get() if HydraConfig.initialized() else None
    # After a sweep has ended, Hydra keeps a node without the number.
    if hydra is None or not is_sweep(hydra) or OmegaConf.is_missing(hydra.job, "num"):
        return None
    return int(hydra.job.num)


def search_key(config: DictConfig, key: str) -> Any:
    """Return the value of `halving` or `tune` in the program's config.

    Raises ConfigErrors if it can't be resolved.
    """
    try:
        return config.get(key)
    except OmegaConfBaseException as error:
        raise ConfigErrors([Problem(key, first_line(error), "leave it out")]) from error


def quoted(value: str) -> str:
    """Return a text quoted so that Hydra's grammar and OmegaConf read it back unchanged."""
    # In Hydra's grammar a backslash escapes only a quote, or another backslash before a quote. OmegaConf has the same
    # rule for `${`.
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    inner = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), literal)
    return f"'{inner}'"
