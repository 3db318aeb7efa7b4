"""The checkpoint from which a run resumes, and the roll-back of the run's folder."""

from __future__ import annotations

import math
import re
from pathlib import Path

from omegaconf import DictConfig

from loraplus_hydra.check import Checked
from loraplus_hydra.config.identity import ROWS, run_hash
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, refuse
from loraplus_hydra.io import checkpoints, files, folders, processes, run_folder, screen
from loraplus_hydra.io.checkpoint_state import trainer_state
from loraplus_hydra.io.checkpoints import AUTO, KEY, Checkpoint, ResumePoint
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.read import Missing, read_bytes, read_json
from loraplus_hydra.io.result import OK, Result, read_result
from loraplus_hydra.models.adapter_files import CONFIG as ADAPTER_CONFIG
from loraplus_hydra.models.adapter_files import refuse_other_tensors
from loraplus_hydra.models.eva import awaits_directions, take_ranks
from loraplus_hydra.models.initialisation import changes_base
from loraplus_hydra.runs.changed_inputs import refuse_other_inputs, with_inputs
from loraplus_hydra.runs.stored_config import changed_values, changes
from loraplus_hydra.training.checkpoint_changes import full_name, refuse_other_groups
from loraplus_hydra.training.hf_trainer.checkpoint_callback import evaluations_without_gain
from loraplus_hydra.training.prepare import loraplus_settings, plan_groups

_LARGEST_METRICS = 2**31  # bytes
_TRAINED_WITH = (
    *("model", "quantization", "adapter", "task", "optimizer", "scheduler", "loraplus", "data", "trainer", "seed"),
)
# Keys of these groups that don't change the weights: they evaluate, log, save, or only save memory or time
_NOT_TRAINED_WITH = re.compile(
    r"task\.(metric|greater_is_better|samples|sample_tokens)"
    r"|trainer\.(eval|logging|log|save|early_stopping|ddp|hub|torch_compile)_\w+"
    r"|trainer\.dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context)"
    r"|trainer\.(per_device_eval_batch_size|batch_eval_metrics|prediction_loss_only|include_for_metrics)"
    r"|trainer\.(load_best_model_at_end|metric_for_best_model|greater_is_better|(bf16|fp16)_full_eval)"
    r"|trainer\.(use_cpu|auto_batch|forward|activation_checkpointing|torch_compile|disable_tqdm|report_to|run_name)"
)
_PLANNED_WITH = ("trainer.max_steps", "trainer.num_train_epochs")


def finished_result(config: DictConfig, folder: Path) -> Result | None:
    """Return the stored result if a resume was requested and the run in `folder` has already finished.

    The run must have finished with this config. Otherwise return None.
    """
    if config.trainer.get("resume_from_checkpoint") is None:
        return None
    result = read_result(folder)
    if result is None or result.status != OK or not (folder / run_folder.ADAPTER).is_dir():
        return None
    return result if result.config_hash == run_hash(config) else None


def finished_message(folder: Path, result: Result) -> str:
    """Return the message about a run that has finished."""
    return f"The run in {folder} has finished: {result.steps} steps, {result.metric} {result.value}"


def resume_point_or_exit(checked: Checked, folder: Path, *, found_before: ResumePoint | None = None) -> ResumePoint:
    """Return the resume point of a checked config. End the program if the run has finished.

    The command line calls this before Hydra writes into the folder. Raises UserError if the run can't resume.
    """
    if processes.is_main():
        folders.refuse_foreign(folder, key="hydra.run.dir")
    if (result := finished_result(checked.config, folder)) is not None:
        refuse_other_inputs(checked.config, result)
        if processes.is_main():
            print(finished_message(folder, result))
        raise SystemExit(0)
    with folder_lock(folder):
        return find_resume_point(checked, folder, found_before=found_before)


def find_resume_point(checked: Checked, folder: Path, *, found_before: ResumePoint | None = None) -> ResumePoint:
    """Return the point from which a checked config resumes in `folder`. No file is changed.

    If `found_before` is still valid, the checkpoint's files are not hashed again. Raises UserError if the run can't
    resume: other groups, or fewer steps.
    """
    changed = tuple(changes(folder / run_folder.CONFIG, checked.config))
    checkpoint, messages = _find_checkpoint(checked, folder, found_before)
    if checkpoint is None:
        _refuse_to_replace(folder)
        return ResumePoint(None, changed, messages)
    _refuse_other_training(checked, checkpoint)
    refuse(_start_problems(checked.config, checkpoint, changed))
    refuse(_stream_problems(checked.config, folder / run_folder.CONFIG))
    _refuse_changes_at_the_end(checked.config, checkpoint, changed)
    _lines_until(checkpoint)
    before = found_before or ResumePoint(None)
    point = ResumePoint(checkpoint, changed, messages, before.new_rows, before.inputs)
    return with_inputs(point, checked.config, accepted=read_result(folder))


def _find_checkpoint(
    checked: Checked, folder: Path, found_before: ResumePoint | None
) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the checkpoint to resume from, and a message for each newer, incomplete one."""
    if found_before is not None and _still_holds(found_before, checked.config, folder):
        return found_before.checkpoint, found_before.messages
    if (named := checked.checkpoint) is not None:
        return named if named.is_unchanged() else checkpoints.open_checkpoint(named.folder), ()
    return checkpoints.newest_complete(folder / run_folder.CHECKPOINTS)


def _still_holds(point: ResumePoint, config: DictConfig, folder: Path) -> bool:
    """Return True if no other process has changed the run since `point` was found."""
    if point.checkpoint is None or not point.checkpoint.is_unchanged():
        return False
    if config.trainer.resume_from_checkpoint != AUTO:
        return True
    complete = checkpoints.sealed(folder / run_folder.CHECKPOINTS)
    return bool(complete) and complete[-1].resolve() == point.checkpoint.folder.resolve()


def roll_back(point: ResumePoint, folder: Path) -> None:
    """Roll `folder` back to the checkpoint: shorten metrics.jsonl, rename newer checkpoints."""
    metrics = folder / run_folder.METRICS
    step = -1 if point.checkpoint is None else point.checkpoint.step
    # Checkpoints first. If the process is killed after this, the run resumes from the same checkpoint again.
    for place in checkpoints.in_order(folder / run_folder.CHECKPOINTS):
        if checkpoints.step_of(place) > step:
            _set_aside(place)
    if point.checkpoint is None:
        files.remove(metrics)
        return
    own, lines = _lines_until(point.checkpoint)
    if len(lines) < point.checkpoint.state.metrics_bytes:
        screen.show(f"    Note: {own} has fewer lines than at step {step}; some are missing")
    if own.resolve() == metrics.resolve() and metrics.is_file():
        files.truncate(metrics, len(lines))
    else:
        files.write_text(metrics, lines.decode("utf-8", errors="replace"))


def _lines_until(checkpoint: Checkpoint) -> tuple[Path, bytes]:
    """Return the metrics.jsonl of the checkpoint's run, and its content at the checkpoint.

    Raises UserError if the file has been replaced since.
    """
    own = checkpoint.folder.parent.parent / run_folder.METRICS
    try:
        lines = read_bytes(own, _LARGEST_METRICS)[: checkpoint.state.metrics_bytes]
    except Missing:
        lines = b""
    is_complete = len(lines) == checkpoint.state.metrics_bytes
    if is_complete and lines and not lines.endswith(b"\n"):
        raise UserError(f"{own} does not belong to {checkpoint.folder.name}; use another checkpoint")
    return own, lines


def _set_aside(place: Path) -> None:
    """Free a checkpoint's name: remove it if it is incomplete, otherwise rename it."""
    if not (place / checkpoints.MANIFEST).is_file():
        checkpoints.unseal(place)
        return
    aside = place.with_name(f"set-aside-{place.name}")
    checkpoints.unseal(aside)
    folders.move(place, aside)
    screen.show(f"    Note: {place.name} is newer than the checkpoint to resume from; it was renamed to {aside.name}")


def _refuse_other_training(checked: Checked, checkpoint: Checkpoint) -> None:
    config = checked.config
    steps = config.trainer.get("max_steps", -1)
    if 0 < steps < checkpoint.step:
        what = f"the checkpoint is of step {checkpoint.step}, beyond trainer.max_steps={steps}"
        raise ConfigErrors([Problem("trainer.max_steps", what, "set more steps, or use an earlier checkpoint")])
    epochs, reached = config.trainer.get("num_train_epochs", 3.0), trainer_state(checkpoint.folder).epoch
    if steps <= 0 and reached > epochs:
        what = f"the checkpoint is of epoch {reached:.3g}, beyond {epochs:g}"
        raise ConfigErrors([Problem("trainer.num_train_epochs", what, "set more epochs, or use an earlier checkpoint")])
    plan = checked.plan
    if awaits_directions(checked.model):
        take_ranks(checked.model, checkpoint.folder)
        plan = plan_groups(config, checked.model)[1]
    groups = {group.name: [record.name for record in group.records] for group in plan.groups}
    refuse_other_groups(checkpoint.state, full_name(loraplus_settings(config).optimizer_class), groups)
    refuse_other_tensors(checkpoint.folder, checked.model)


def _start_problems(config: DictConfig, checkpoint: Checkpoint, changed: tuple[str, ...]) -> list[Problem]:
    """Return a Problem for a change of a start that changes the base, because a resume repeats this start."""
    then = read_json(checkpoint.folder / ADAPTER_CONFIG).get("init_lora_weights")
    now = None if config.adapter.get("path") else config.adapter.get("init_lora_weights")
    fix = "a start can't change after step 0: remove this change, or start a new run"
    if then != now and (changes_base(then) or changes_base(now)):
        what = f"is {now}, but the run started with {then}, and such a start changes the base"
        return [Problem("adapter.init_lora_weights", what, fix)]
    if str(now).startswith("pissa_niter") and any(change.startswith("seed:") for change in changed):
        return [Problem("seed", f"decides the start {now}, which changes the base", fix)]
    return []


def _stream_problems(config: DictConfig, stored: Path) -> list[Problem]:
    """Return a Problem if a step has another number of rows than before, and the rows are streamed."""
    # A checkpoint's place in a stream is a number of steps, because the number of rows in an epoch is unknown
    values = changed_values(stored, config) if config.data.get("streaming") else {}
    changed = {f"trainer.{name}": values[f"trainer.{name}"] for name in ROWS if f"trainer.{name}" in values}
    numbers = [number for pair in changed.values() for number in pair]
    if all(isinstance(number, int) for number in numbers):
        then, now = (math.prod(pair[side] for pair in changed.values()) for side in (0, 1))
        if then == now:
            return []
    what = "a step would have another number of rows, so the place in the stream would be another"
    fix = f"keep the product of {' and '.join(ROWS)}, or start a new run"
    return [Problem(key, what, fix) for key in changed]


def _refuse_to_replace(folder: Path) -> None:
    """Raise ConfigErrors if a new start would overwrite the results of a finished or damaged run."""
    result = read_result(folder)
    damaged = checkpoints.sealed(folder / run_folder.CHECKPOINTS)
    # The adapter is only ever written whole, so it is a finished run's even if result.json is missing or damaged
    has_adapter = (folder / run_folder.ADAPTER).exists()
    if damaged or has_adapter or (result is not None and result.status == OK):
        what = f"{folder} has no complete checkpoint" if damaged else f"the run in {folder} has no checkpoint"
        what += f", but the adapter {folder / run_folder.ADAPTER}" if has_adapter else ""
        fix = "it can't resume, and a new start would overwrite its files: start a new run in another folder"
        raise ConfigErrors([Problem(KEY, what, fix)])


def _refuse_changes_at_the_end(config: DictConfig, checkpoint: Checkpoint, changed: tuple[str, ...]) -> None:
    """Raise ConfigErrors for changes that have no effect, because no step is left to train."""
    trainer, state = config.trainer, trainer_state(checkpoint.folder)
    steps, patience = trainer.get("max_steps", -1), trainer.get("early_stopping_patience")
    has_steps = steps > checkpoint.step if steps > 0 else trainer.get("num_train_epochs", 3.0) > state.epoch
    stopped_early = patience is not None and evaluations_without_gain(state) >= patience
    if has_steps and not stopped_early:
        return
    without = set(_PLANNED_WITH) if checkpoint.step < state.max_steps else set()  # they may end the run here
    if trainer.get("auto_batch"):  # config.yaml has the division of the rows that was found
        without |= {f"trainer.{name}" for name in ROWS}
    keys = {change: change.split(":")[0] for change in changed}
    idle = [
        change
        for change, key in keys.items()
        if key.split(".")[0] in _TRAINED_WITH and key not in without and not _NOT_TRAINED_WITH.fullmatch(key)
    ]
    if idle:
        what = f"all {checkpoint.step} steps are done, so these changes would have no effect: {'; '.join(idle)}"
        raise ConfigErrors([Problem("run", what, "set more steps (trainer.max_steps), or remove these changes")])
