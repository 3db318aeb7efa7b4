"""What Hydra says of the job at hand: whether it is one of a sweep, and which."""

from __future__ import annotations

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
