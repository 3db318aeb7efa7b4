"""What Hydra says of the job at hand: whether it is one of a sweep, and which."""

from __future__ import annotations

import re
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


def is_sweep(hydra: Any) -> bool:
    """Whether Hydra's node is that of a sweep or of one of its jobs."""
    return getattr(hydra.mode, "name", hydra.mode) == "MULTIRUN"


def number_in_sweep() -> int | None:
    """The number of the job that runs in a sweep, from 0; None outside one."""
    hydra: Any = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or not is_sweep(hydra) or OmegaConf.is_missing(hydra.job, "num"):  # of a sweep that is over
        return None
    return int(hydra.job.num)


def quoted(value: str) -> str:
    """A value as Hydra's grammar and OmegaConf read it back, whatever characters are in it.

    To Hydra a backslash escapes only a quote, or a backslash in front of one; to OmegaConf only `${`, likewise.
    """
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    inner = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), literal)
    return f"'{inner}'"
