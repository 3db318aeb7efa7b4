"""The tracker of a run, from start to finish."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from loraplus_hydra.config.hydra_job import is_sweep
from loraplus_hydra.config.plain import flat, plain_of, without_credentials
from loraplus_hydra.config.targets import instantiate
from loraplus_hydra.config.types import fits
from loraplus_hydra.errors import first_line
from loraplus_hydra.io import processes
from loraplus_hydra.io.result import Result
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker

log = logging.getLogger(__name__)


class Tracking:
    """The tracker in the config, if there is one.

    If the tracker fails, the run warns once and continues without it.
    """

    def __init__(self) -> None:
        self._tracker: Tracker | None = None
        self._works = False

    def start(self, config: DictConfig, folder: Path, resumed_at: int | None) -> None:
        """Start the tracker of the run in `folder` with its checked `config`.

        `resumed_at` has the meaning of TrackedRun's field.
        """
        logger = config.get("logger")
        if not logger or logger.get("_target_") is None or not processes.is_main():
            return
        self._works = True
        self._attempt(lambda: self._start(logger, _tracked_run(config, folder, resumed_at)))

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass the numbers of a line of metrics.jsonl to the tracker."""
        tracker = self._tracker
        if tracker is None or not self._works:
            return
        values = {key: value for key, value in flat(line, "/").items() if key != "step" and fits(value, float)}
        self._attempt(lambda: tracker.log(line["step"], values))

    def finish(self, result: Result) -> None:
        """Close the tracker with the run's final `result`."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:  # also a tracker that has failed, because its session must be closed
            self._attempt(lambda: tracker.finish(result.status, final_metrics(result)))

    def _start(self, logger: DictConfig, run: TrackedRun) -> None:
        self._tracker = instantiate(logger)
        self._tracker.start(run)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # any error, because the run's own files have all numbers
            if self._works:
                log.warning(
                    "Warning: the run continues without its logger, which failed: %s: %s. metrics.jsonl has everything",
                    type(error).__name__,
                    first_line(error),
                )
                log.debug("The logger failed.", exc_info=True)
            self._works = False


def final_metrics(result: Result) -> dict[str, float]:
    """Return the numbers at the end of a run, by name.

    A failed run has only some of these numbers.
    """
    values: dict[str, Any] = {
        **result.metrics,
        "train_loss": result.train_loss,
        f"best_{result.metric}": result.best.get("value"),
        "steps": result.steps,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
    }
    return {key: value for key, value in values.items() if fits(value, float)}


def _tracked_run(config: DictConfig, folder: Path, resumed_at: int | None) -> TrackedRun:
    started_in, sweep = _origin()
    folder = folder.absolute()
    inside = folder.relative_to(started_in) if folder.is_relative_to(started_in) else Path(folder.name)
    return TrackedRun(
        folder=folder,
        name=folder.name if sweep else str(inside),
        group=sweep,
        config=without_credentials(plain_of(config)),  # other people may read a tracker
        started_in=started_in,
        resumed_at=resumed_at,
    )


def _origin() -> tuple[Path, str | None]:
    """Return the folder where the command was given, and the sweep's name or None."""
    if not HydraConfig.initialized():
        return Path.cwd(), None
    hydra: Any = HydraConfig.get()
    name = os.path.basename(os.path.normpath(hydra.sweep.dir)) if is_sweep(hydra) else None  # noqa: PTH119
    return Path(hydra.runtime.cwd), name
