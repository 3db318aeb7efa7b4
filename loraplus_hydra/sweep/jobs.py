"""One job of a sweep.

A job is skipped if it is done, and resumed if it was stopped. With halving, it stops at a rung and waits. A failed job
does not end the sweep.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from loraplus_hydra.config.identity import ALLOW
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import checkpoints, interrupts, job_status, run_folder, screen
from loraplus_hydra.io.checkpoints import ResumePoint
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.quiet_libraries import quiet_libraries
from loraplus_hydra.io.result import WAITING, Result, read_result
from loraplus_hydra.io.rungs import read_rungs
from loraplus_hydra.sweep.folders import State, clear, folder_state
from loraplus_hydra.sweep.gpus import claim_gpu
from loraplus_hydra.sweep.isolation import isolated, release_frames

_log_file = logging.getLogger()  # the root logger, which has one handler: the job's log file (see conf/app.yaml)


@dataclass(frozen=True)
class _Job:
    """A job's folder, and the place of its status file."""

    folder: Path
    sweep: Path
    start: str
    overrides: Sequence[str]

    @property
    def name(self) -> str:
        return os.path.relpath(self.folder, self.sweep)

    def set_status(self, status: str, text: str = "", value: float | None = None) -> None:
        job_status.write(self.sweep, self.start, job_status.JobStatus(self.name, status, text, value, self.overrides))


def run_job(root: DictConfig) -> float | None:
    """Run the job whose folder Hydra has made, unless it is done.

    `root` is the program's config. Returns the metric that the sweep compares; None for a failed job. A failed job
    raises no error, because Hydra would end the sweep. The job's status file has the error.
    """
    interrupts.stop_if_asked()
    hydra: Any = HydraConfig.get()
    # Unresolved, because a search compares them with the overrides that it gave
    overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    sweep = Path(hydra.sweep.dir).absolute()
    job = _Job(Path(hydra.runtime.output_dir), sweep, str(root.sweep.start), overrides)
    config = run_of(root)
    state = folder_state(job.folder, config)
    stop_at = root.sweep.stop_at
    waits = state is State.LEFT and any(rung.stop_at == stop_at for rung in read_rungs(job.folder))
    if state is not State.DONE and not waits:
        job.set_status(job_status.RUNNING)
        claim_gpu(hydra)
    try:
        if state is State.DONE:
            return _skip(config, job, job_status.SKIPPED)
        if waits:
            return _skip(config, job, job_status.WAITING)
        result = _train(config, job, state, stop_at)
    except KeyboardInterrupt:
        job.set_status(job_status.INTERRUPTED)
        raise
    except (Exception, SystemExit) as error:
        _report_failure(job, error)
        return None
    job.set_status(job_status.WAITING if result.status == WAITING else job_status.DONE, value=result.value)
    interrupts.stop_if_asked()  # after a signal, no further job begins
    return result.value


def _skip(config: DictConfig, job: _Job, status: str) -> float | None:
    """Return the stored metric of a job that is done, or that has stopped at this rung before.

    Raises ConfigErrors if the job's rows or weights have changed since.
    """
    result = read_result(job.folder)
    if result is None:  # of a job at a rung, whose result.json has been damaged since
        job.set_status(status)
        return None
    if not config[ALLOW]:
        quiet_libraries()
        # Takes seconds, and possibly no job must run
        from loraplus_hydra.runs.changed_inputs import refuse_other_inputs

        refuse_other_inputs(config, result, start=job.start)
    before = "Stopped at this rung before" if status == job_status.WAITING else "Done before"
    value = "" if result.value is None else f": {result.metric} {result.value}"
    screen.show(f"    {before}: {job.name}{value}")
    job.set_status(status, value=result.value)
    return result.value


def _report_failure(job: _Job, error: BaseException) -> None:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    screen.show(f"    Failed: {text}")
    _log_file.error("The job failed.", exc_info=error)
    job.set_status(job_status.FAILED, text)
    release_frames(error)


def _train(config: DictConfig, job: _Job, state: State, stop_at: float | None) -> Result:
    if state is State.TAKEN:
        raise UserError(f"{job.folder} has the run of another config, and it is not changed")
    with isolated(config):
        # Imported here, because `isolated` first sets the environment that libraries read
        from loraplus_hydra.runs.job import run

        return run(config, job.folder, point=_resume_or_clear(config, job.folder), stop_at=stop_at)


def _resume_or_clear(config: DictConfig, folder: Path) -> ResumePoint | None:
    """Set `config` to resume from the newest complete checkpoint. Without one, clear the folder.

    Another start of the sweep may have finished the job meanwhile, because imports take seconds. Then it is kept.
    """
    checkpoint, messages = checkpoints.newest_complete(folder / run_folder.CHECKPOINTS)
    if checkpoint is None:
        with folder_lock(folder):
            if folder_state(folder, config) is not State.DONE:
                clear(folder)
                return None
    with open_dict(config):
        config.trainer.resume_from_checkpoint = checkpoints.AUTO
    return ResumePoint(checkpoint, messages=messages)
