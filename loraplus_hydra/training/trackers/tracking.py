"""A run's tracker through its life: started, told each line of metrics.jsonl, finished however the run ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.flatten import flat
from loraplus_hydra.config.targets import instantiate
from loraplus_hydra.errors import first_line
from loraplus_hydra.io import processes
from loraplus_hydra.training.trackers.tracker import TrackedRun

if TYPE_CHECKING:
    from loraplus_hydra.io.result import Result
    from loraplus_hydra.training.trackers.tracker import Tracker

log = logging.getLogger(__name__)


class Tracking:
    """The tracker that the config names, or none. One that fails is told once; the run goes on without it."""

    def __init__(self) -> None:
        self._tracker: Tracker | None = None
        self._works = False

    def start(self, config: DictConfig, folder: Path, resumed_at: int | None) -> None:
        """Begin with the checked `config` of the run in `folder`; `resumed_at` as in TrackedRun."""
        logger = config.get("logger")
        if not logger or logger.get("_target_") is None or not processes.is_main():
            return
        self._works = True
        self._do(lambda: self._begin(logger, _described(config, folder, resumed_at)))

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass the numbers of a line of metrics.jsonl on, at its step."""
        tracker = self._tracker
        if tracker is None or not self._works:
            return
        values = {key: value for key, value in flat(line, "/").items() if key != "step" and _is_number(value)}
        self._do(lambda: tracker.log(line["step"], values))

    def finish(self, result: Result) -> None:
        """The end of the run, whose `result` is final. One that has failed is finished too, so that nothing stays."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            self._do(lambda: tracker.finish(result.status, final_metrics(result)))

    def _begin(self, logger: DictConfig, run: TrackedRun) -> None:
        self._tracker = instantiate(logger)
        self._tracker.start(run)

    def _do(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # whatever it is, it is the tracker's, and the run's own files are written
            if self._works:
                log.warning(
                    "Warning: the run goes on without its logger, which failed: %s: %s. metrics.jsonl has everything",
                    type(error).__name__,
                    first_line(error),
                )
                log.debug("The logger failed.", exc_info=True)
            self._works = False


def final_metrics(result: Result) -> dict[str, float]:
    """The numbers at the end of a run, by name; of one that failed, those that it came to."""
    told: dict[str, Any] = {
        **result.metrics,
        "train_loss": result.train_loss,
        f"best_{result.metric}": result.best.get("value"),
        "steps": result.steps,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
    }
    return {key: value for key, value in told.items() if _is_number(value)}


def _described(config: DictConfig, folder: Path, resumed_at: int | None) -> TrackedRun:
    plain: Any = OmegaConf.to_container(config, resolve=True)
    started_in, sweep = _place()
    folder = folder.absolute()
    inside = folder.relative_to(started_in) if folder.is_relative_to(started_in) else Path(folder.name)
    return TrackedRun(
        folder=folder,
        name=folder.name if sweep else str(inside),
        group=sweep,
        config=plain,
        started_in=started_in,
        resumed_at=resumed_at,
    )


def _place() -> tuple[Path, str | None]:
    """Where the command was given, and the sweep's name if this is a job of one."""
    from hydra.core.hydra_config import HydraConfig

    from loraplus_hydra.config.hydra_job import is_sweep

    if not HydraConfig.initialized():
        return Path.cwd(), None
    hydra: Any = HydraConfig.get()
    name = os.path.basename(os.path.normpath(hydra.sweep.dir)) if is_sweep(hydra) else None  # noqa: PTH119
    return Path(hydra.runtime.cwd), name


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
