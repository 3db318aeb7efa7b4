"""Values that a sweep passes to its jobs in Hydra's config, under any launcher."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraplus_hydra.config.hydra_job import quoted


def job_overrides(folder: Path, swept: Iterable[str], start: str) -> list[str]:
    """Return the overrides that pass jobs the sweep's folder, keys and start."""
    return [
        f"hydra.sweep.dir={quoted(str(folder))}",  # absolute: workers may start in another folder
        f"hydra.callbacks.before_run.swept=[{','.join(map(quoted, swept))}]",
        f"hydra.callbacks.before_run.start={quoted(start)}",  # quoted: 12e456789012 would be a number
    ]


def swept_keys(hydra: Any) -> list[str]:
    """Return the keys that the sweep varies, from Hydra's node of a job's config."""
    return list(hydra.callbacks.before_run.swept)


def start_name(hydra: Any) -> str:
    """Return the name of the sweep's start, from Hydra's node of a job's config."""
    return str(hydra.callbacks.before_run.start)
