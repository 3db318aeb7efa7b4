"""One run: from a config to a trained adapter and a result."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from loraplus_hydra.check import Checked, check
from loraplus_hydra.config.identity import run_hash
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.config.plain import value_at
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.config.stored_paths import with_absolute_paths
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import files, folders, interrupts, processes, run_folder, screen
from loraplus_hydra.io.checkpoints import AUTO, KEY, ResumePoint, sealed
from loraplus_hydra.io.fingerprints import refuse_changed
from loraplus_hydra.io.interrupts import Interrupted
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.quiet_libraries import quiet_libraries, quiet_loading
from loraplus_hydra.io.result import FAILED, INTERRUPTED, OK, WAITING, Result, read_result, versions
from loraplus_hydra.io.rungs import add_rung
from loraplus_hydra.loraplus.plan import Plan, table_rows
from loraplus_hydra.models import published_rate
from loraplus_hydra.models.adapter_files import save_adapter
from loraplus_hydra.models.inputs import folder_fingerprint
from loraplus_hydra.runs import display
from loraplus_hydra.runs.batch import fit_batch
from loraplus_hydra.runs.changed_inputs import refuse_other_inputs
from loraplus_hydra.runs.figure import draw_training
from loraplus_hydra.runs.inspection import advice_of, explanation_of
from loraplus_hydra.runs.limits import explain_resource_errors
from loraplus_hydra.runs.resume import find_resume_point, finished_message, finished_result, roll_back
from loraplus_hydra.runs.stored_config import read_plain
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.hf_trainer.rung import RungReached
from loraplus_hydra.training.hf_trainer.train import train
from loraplus_hydra.training.hf_trainer.whole_tensors import whole_tensors
from loraplus_hydra.training.measure import reset_peak_memory
from loraplus_hydra.training.prepare import Prepared, prepare
from loraplus_hydra.training.process_state import import_early, process_state
from loraplus_hydra.training.trackers.tracking import Tracking


@dataclass(frozen=True)
class Run:
    """The run in progress: its config, folder, result so far, and checkpoint to resume from."""

    config: DictConfig
    folder: Path
    result: Result
    point: ResumePoint | None
    tracking: Tracking


def run(
    config: DictConfig | Checked,
    folder: str | Path | None = None,
    *,
    point: ResumePoint | None = None,
    stop_at: float | None = None,
) -> Result:
    """Train one adapter with `config` and write all files into `folder`.

    `config` is a composed `run` config, checked or not. The default of `folder` is the folder that Hydra made for the
    job. Without Hydra, as in a notebook, it is outputs/DATE/TIME; messages are then printed, unless the logger
    `loraplus_hydra` has a level. With `trainer.resume_from_checkpoint`, the run resumes from a checkpoint; `point` is
    this checkpoint if the caller has found it before. With `stop_at`, a share of the steps, the run stops there with a
    checkpoint and the status `waiting`; rungs.json has its losses. Returns the result; `result.value` is the metric
    that a sweep optimises.

    A run never overwrites another: if one has begun in `folder`, UserError is raised, unless this run resumes it. A
    resumed run that has finished with this config is not changed, and its stored result is returned. Torch's
    settings, the environment and the random generators are afterwards as before. An invalid config raises ConfigErrors
    before anything is loaded. Any other error is written into result.json and then raised.
    """
    quiet_libraries()
    checked = config if isinstance(config, Checked) else None
    published_rate.register()
    config = run_of(config.config if isinstance(config, Checked) else config)
    folder = processes.shared_folder(Path(folder) if folder is not None else _default_folder())
    folders.make_folder(folder)
    with screen.messages_on_stdout(), interrupts.kept_signals():
        import_early(config)
        with process_state():
            return _run_in(folder, config, checked, point, stop_at)


def _run_in(
    folder: Path, config: DictConfig, checked: Checked | None, point: ResumePoint | None, stop_at: float | None
) -> Result:
    """Train in `folder`, or return the stored result of a run that has finished there with this config."""
    with folder_lock(folder) as is_locked:
        if processes.is_main():
            folders.refuse_foreign(folder, key="hydra.run.dir")
            if not _is_of(folder, config.trainer.get("resume_from_checkpoint")):
                _refuse_begun(folder)
        if is_locked:
            folders.remove_drafts(folder)
        if (done := finished_result(config, folder)) is not None:
            refuse_other_inputs(config, done)
            screen.show(finished_message(folder, done))
            return done
        if config.trainer.get("resume_from_checkpoint") is not None:
            # Called before any file in the folder is changed.
            checked = checked or check(config)
            point = find_resume_point(checked, folder, found_before=point)
        with _recorded(config, folder, point) as job, explain_resource_errors(config, folder):
            try:
                _run(job, checked, stop_at)
            except RungReached as reached:
                job.result.status = WAITING
                rung = reached.rung
        if job.result.status == WAITING:
            # Written after result.json, so that a job with a rung has a result, too
            add_rung(folder, rung)
            measured = (
                f"with loss {rung.loss:.4f} on {len(rung.losses)} held-out rows" if rung.losses else "not compared"
            )
            screen.show(f"Waiting at step {rung.step}, {measured}")
            return job.result
    if processes.is_main():
        draw_training(folder / run_folder.METRICS, folder / run_folder.FIGURE)
        display.show_result(folder, job.result)
    return job.result


def _run(job: Run, checked: Checked | None, stop_at: float | None) -> None:
    interrupts.stop_if_asked()
    reset_peak_memory()  # otherwise the peak would be that of earlier runs in this process
    screen.show("1/6 Checking the config")
    checked = checked or check(job.config)
    quiet_loading()
    if job.config.trainer.get("auto_batch"):
        job = replace(job, config=fit_batch(checked, job.folder))
    _begin(job)
    resumed = job.point is not None and job.point.checkpoint is not None
    prepared = prepare(job.config, resumed=resumed)  # steps 2 to 4
    if job.point is not None:  # compared again, because all weights are on this machine only now
        refuse_changed(job.point.expected, prepared.inputs)
    job.result.inputs = dict(prepared.inputs)  # after the comparison, because a resume accepts stored fingerprints
    trainer = make_trainer(prepared, job.folder, job.point, job.tracking.log, stop_at)
    _show_and_write_plan(job.folder, prepared, trainer.loraplus_plan)
    interrupts.stop_if_asked()
    screen.show("5/6 Training")
    train(trainer, prepared, job.result, job.point, stop_at)
    screen.show("6/6 Saving the adapter")
    whole = whole_tensors(trainer)
    if processes.is_main():
        with interrupts.notice("the adapter is saved first"):
            _save(job, prepared, run_folder.ADAPTER, whole)
            if job.config.trainer.get("ema") is not None:
                with trainer.ema.in_model():
                    _save(job, prepared, run_folder.ADAPTER_EMA)
            else:  # one from before a resume that switched it off
                folders.remove(job.folder / run_folder.ADAPTER_EMA)


def _is_of(folder: Path, named: str | None) -> bool:
    """Return True if `trainer.resume_from_checkpoint` names a checkpoint of the run in `folder`.

    It may also be another run's checkpoint from which the run in `folder` began.
    """
    if named is None or named == AUTO:
        return named == AUTO
    places = [expanded(str(name)).resolve() for name in (named, value_at(read_plain(folder / run_folder.CONFIG), KEY))]
    return places[0] == places[1] or places[0].parent.parent == folder.resolve()


def _refuse_begun(folder: Path) -> None:
    """Raise UserError if a run has begun in `folder`. Files of Hydra and of others may be there."""
    result = read_result(folder)
    # After an error in the config, result.json has only this error, and the corrected config may have the folder
    is_only_error = result is not None and result.status == FAILED and not result.config_hash
    names = set(run_folder.WRITTEN) - ({run_folder.RESULT} if is_only_error else set())
    if any((folder / name).exists() for name in names):
        folders.refuse_used_folder(folder, key="hydra.run.dir")


def _default_folder() -> Path:
    if HydraConfig.initialized():
        runtime = HydraConfig.get().runtime
        # It is missing if a config was composed but no job has begun
        if not OmegaConf.is_missing(runtime, "output_dir"):
            return Path(runtime.output_dir)
    return Path(f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S}")  # the same name as in conf/app.yaml


@contextmanager
def _recorded(config: DictConfig, folder: Path, point: ResumePoint | None) -> Iterator[Run]:
    """Write the run's result into `folder` and pass it to the tracker, also after an error."""
    started = time.perf_counter() - (0.0 if point is None else point.seconds)
    result = Result(status=FAILED, metric=str(OmegaConf.select(config, "task.metric")), versions=versions())
    job = Run(config, folder, result, point, Tracking())
    try:
        yield job
        result.status = result.status if result.status == WAITING else OK
    except KeyboardInterrupt:
        result.status = INTERRUPTED
        _print_resume_hint(folder)
        raise
    except (Exception, SystemExit) as error:
        if interrupts.requested() and "DataLoader worker" in str(error):  # the signal also ended the workers
            result.status = INTERRUPTED
            raise Interrupted(interrupts.requested()) from error
        result.error = {"type": type(error).__name__, "text": str(error)}
        _print_resume_hint(folder)
        raise
    finally:
        result.seconds = round(time.perf_counter() - started, 3)
        # An earlier start's result stays as long as this one has changed nothing of the folder
        if processes.is_main() and (result.config_hash or read_result(folder) is None):
            _write_result(job)
        job.tracking.finish(result)


def _write_result(job: Run) -> None:
    """Write result.json. If this fails after an earlier error, only print the reason."""
    try:
        with explain_resource_errors(job.config, job.folder):
            job.result.write(job.folder)
    except (OSError, UserError) as error:
        if job.result.status == OK:
            raise
        screen.show(f"{run_folder.RESULT} could not be written: {error}")


def _print_resume_hint(folder: Path) -> None:
    checkpoints = sealed(folder / run_folder.CHECKPOINTS)
    if checkpoints and processes.is_main():
        command = f"python -m loraplus_hydra resume {shlex.quote(str(folder))}"
        screen.show(f"The last checkpoint is {checkpoints[-1].name}. To resume: {command}")


def _begin(job: Run) -> None:
    """Start the tracker, write and show the config, and roll back a resumed run's folder."""
    job.result.seed = job.config.seed
    job.result.config_hash = run_hash(job.config)  # from now on, the result is that of this start
    if processes.is_main():
        if job.point is not None:
            _begin_resumed(job, job.point)
        stored = OmegaConf.to_yaml(with_absolute_paths(job.config), resolve=True)
        files.write_text(job.folder / run_folder.CONFIG, stored)
        display.show_config(job.config)
    job.tracking.start(job.config, job.folder, resumed_at=None if job.point is None else job.point.step)


def _begin_resumed(job: Run, point: ResumePoint) -> None:
    previous = read_result(job.folder)
    for message in point.messages:
        screen.show(f"    {message}")
    # Otherwise this is the run's first start
    if point.checkpoint or previous or (job.folder / run_folder.METRICS).is_file():
        at = f"from step {point.step}" if point.checkpoint else "from step 0, because there is no complete checkpoint"
        screen.show(f"    Resuming: {at}")
        job.result.resumed_at = [*(previous.resumed_at if previous else ()), point.step]
    for change in point.changed:
        screen.show(f"    Changed since: {change}")
    if previous is not None or point.checkpoint:
        # The previous status is no longer true. Inputs that were accepted now must stay accepted if this start is
        # killed.
        job.result.inputs = dict(point.inputs)
        replace(job.result, status=INTERRUPTED).write(job.folder)
    roll_back(point, job.folder)


def _show_and_write_plan(folder: Path, prepared: Prepared, plan: Plan) -> None:
    """Show the table of rates and write param_groups.json, both from the Trainer's plan."""
    if not processes.is_main():
        return
    display.show_rates(table_rows(plan))
    display.show_explanation(explanation_of(prepared.config, plan, prepared.model))
    for sentence in advice_of(prepared.config, plan, prepared.model):
        screen.show(f"    Note: {sentence}")
    entries: list[dict[str, Any]] = [tensor.as_dict() for tensor in plan.tensors]
    files.write_text(folder / run_folder.PARAM_GROUPS, json.dumps(entries, indent=2) + "\n")


def _save(job: Run, prepared: Prepared, name: str, whole: dict[str, Tensor] | None = None) -> None:
    """Write the adapter's folder `name`, in PEFT's layout, with the tokenizer.

    `whole` are its tensors, if the model has only parts of them. An incomplete folder is never left.
    """
    with folders.replaced_folder(job.folder / name) as draft:
        save_adapter(prepared.model, prepared.tokenizer, draft, whole)
    job.result.inputs[name] = folder_fingerprint(job.folder / name)
