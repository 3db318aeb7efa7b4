"""One job of a sweep: skipped when it is done, gone on with where it stopped, and no harm to the others if it fails."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import checkpoints, run_folder, screen
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.result import read_result
from loraplus_hydra.sweep import job_status
from loraplus_hydra.sweep.folders import State, clear, hash_of, state_of
from loraplus_hydra.sweep.gpus import take_one
from loraplus_hydra.sweep.isolation import free, isolated

_FILE = logging.getLogger()  # its one handler is the job's log file: see conf/app.yaml


@dataclass(frozen=True)
class _Job:
    """Where a job writes, and where it is noted how it stands."""

    folder: Path
    sweep: Path
    start: str

    @property
    def name(self) -> str:
        return os.path.relpath(self.folder, self.sweep)

    def note(self, status: str, text: str = "", value: float | None = None) -> None:
        job_status.note(self.sweep, self.start, job_status.Record(self.name, status, text, value))


def run_job(config: DictConfig) -> float | None:
    """Run the job that Hydra has made the folder of, unless it is done. Returns the metric that the sweep compares.

    A failed job gives None and raises nothing: Hydra would end the sweep behind it. How it ended is noted for the end
    of the sweep, which tells of it.
    """
    hydra: Any = HydraConfig.get()
    start = str(hydra.callbacks.before_run.start)
    job = _Job(Path(hydra.runtime.output_dir), Path(hydra.sweep.dir).absolute(), start)
    state = state_of(job.folder, hash_of(config))
    if state is State.DONE:
        return _done_before(job)
    job.note(job_status.RUNNING)
    take_one(hydra)
    try:
        if state is State.TAKEN:
            raise UserError(f"{job.folder} holds another config's run, which is left as it is")
        with isolated(config):
            from loraplus_hydra.runs.job import run

            value = run(_prepared(config, job.folder), job.folder).value
    except KeyboardInterrupt:
        job.note(job_status.INTERRUPTED)
        raise
    except (Exception, SystemExit) as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        screen.show(f"    Failed: {text}")
        _FILE.error("The job failed.", exc_info=error)
        job.note(job_status.FAILED, text)
        free(error)
        return None
    job.note(job_status.DONE, value=value)
    return value


def _done_before(job: _Job) -> float | None:
    result = read_result(job.folder)
    assert result is not None, "a job that is done has a result"
    screen.show(f"    Done before: {job.name}: {result.metric} {result.value}")
    job.note(job_status.SKIPPED, value=result.value)
    return result.value


def _prepared(config: DictConfig, folder: Path) -> DictConfig:
    """The config with which the job goes on from its newest whole checkpoint, or begins anew in a cleared folder."""
    if checkpoints.newest_complete(folder / run_folder.CHECKPOINTS) is None:
        with folder_lock(folder):
            clear(folder)
        return config
    with open_dict(config):
        config.trainer.resume_from_checkpoint = "auto"  # resumes
    return config
