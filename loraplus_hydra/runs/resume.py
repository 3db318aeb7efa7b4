"""Where a run goes on from: the newest whole checkpoint, and what of the run's folder belongs to it."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.flatten import flat
from loraplus_hydra.config.identity import run_hash
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import checkpoints, files, processes, run_folder, screen
from loraplus_hydra.io.checkpoint_state import STATE, trainer_state
from loraplus_hydra.io.checkpoints import AUTO, KEY, Checkpoint, ResumePoint
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.result import OK, Result, read_result
from loraplus_hydra.runs.stored_config import read_plain
from loraplus_hydra.training.checkpoint_changes import full_name, refuse_other_groups

_RULES = "loraplus.rules."
_TRAINED_WITH = ("model", "quantization", "adapter", "optimizer", "scheduler", "loraplus", "data", "seed")
_LENGTHENING = ("trainer.max_steps", "trainer.num_train_epochs")


def asked(config: DictConfig) -> bool:
    """Whether the config asks to go on from a checkpoint."""
    return config.trainer.get("resume_from_checkpoint") is not None


def finished(config: DictConfig, folder: Path) -> Result | None:
    """The result of the run in `folder` that has finished with this very config, when it is asked to go on."""
    if not asked(config):
        return None
    result = read_result(folder)
    if result is None or result.status != OK or not (folder / run_folder.ADAPTER).is_dir():
        return None
    return result if result.config_hash == run_hash(config) else None


def told_as_finished(folder: Path, result: Result) -> str:
    """What is said of a run that has finished."""
    return f"The run in {folder} has finished: {result.steps} steps, {result.metric} {result.value}"


def refuse_unfit(config: DictConfig, folder: Path) -> None:
    """Raise UserError if the checked `config` can't go on in `folder`; end the program if nothing is left to do.

    For the command line, before Hydra writes what is asked for into that folder.
    """
    if (result := finished(config, folder)) is not None:
        if processes.is_main():
            print(told_as_finished(folder, result))
        raise SystemExit(0)
    with folder_lock(folder):
        find(config, folder, tell=False)


def find(config: DictConfig, folder: Path, *, tell: bool = True) -> ResumePoint | None:
    """What the checked `config` goes on from in `folder`; None when it doesn't ask to.

    Nothing is touched; `tell` says which checkpoints don't count. Raises UserError when the checkpoint can't be gone on
    from: other groups, or fewer steps.
    """
    if not asked(config):
        return None
    named = config.trainer.resume_from_checkpoint
    changed = tuple(_changes(folder / run_folder.CONFIG, config))
    if named == AUTO:
        checkpoint = checkpoints.newest_whole(folder / run_folder.CHECKPOINTS, tell=tell)
    else:
        checkpoint = checkpoints.open_checkpoint(Path(str(named)).expanduser())
    if checkpoint is None:
        _refuse_to_replace(folder)
    else:
        _refuse_other_training(config, checkpoint)
        _refuse_changes_at_the_end(checkpoint, changed)
        _lines_until(checkpoint)
    return ResumePoint(checkpoint, changed)


def prepare(point: ResumePoint, folder: Path) -> None:
    """Bring `folder` to where the checkpoint was: metrics.jsonl cut to it, newer checkpoints out of the way."""
    metrics = folder / run_folder.METRICS
    step = -1 if point.checkpoint is None else point.checkpoint.step
    # First these: killed in between, the run goes on from the same checkpoint again.
    for place in checkpoints.in_order(folder / run_folder.CHECKPOINTS):
        if checkpoints.step_of(place) > step:
            _set_aside(place)
    if point.checkpoint is None:
        metrics.unlink(missing_ok=True)
        return
    own, lines = _lines_until(point.checkpoint)
    if len(lines) < int(point.checkpoint.state["metrics_bytes"]):
        screen.show(f"    Note: {own} is shorter than it was at step {step}; lines are missing")
    if own.resolve() == metrics.resolve() and metrics.is_file():
        os.truncate(metrics, len(lines))
    else:
        files.write_text(metrics, lines.decode("utf-8", errors="replace"))


def _lines_until(checkpoint: Checkpoint) -> tuple[Path, bytes]:
    """The metrics.jsonl of the checkpoint's own run, and what of it was there when the checkpoint was written.

    Raises UserError for one that was written anew since, from another point.
    """
    own = checkpoint.folder.parent.parent / run_folder.METRICS
    lines = own.read_bytes()[: int(checkpoint.state["metrics_bytes"])] if own.is_file() else b""
    whole = len(lines) == int(checkpoint.state["metrics_bytes"])
    if whole and lines and not lines.endswith(b"\n"):
        raise UserError(f"{own} isn't the one that {checkpoint.folder.name} was written with; name another checkpoint")
    return own, lines


def _set_aside(place: Path) -> None:
    """Out of the way of the checkpoints to come: one that was never finished is removed, any other renamed."""
    if not (place / checkpoints.MANIFEST).is_file():
        checkpoints.unseal(place)
        return
    aside = place.with_name(f"set-aside-{place.name}")
    checkpoints.unseal(aside)
    place.rename(aside)
    screen.show(f"    Note: {place.name} is newer than where this goes on from; it is now {aside.name}")


def _refuse_other_training(config: DictConfig, checkpoint: Checkpoint) -> None:
    from loraplus_hydra.models.adapter_files import refuse_other_tensors
    from loraplus_hydra.training.prepare import loraplus_settings, placed_on_meta

    steps = config.trainer.get("max_steps", -1)
    if 0 < steps < checkpoint.step:
        what = f"the checkpoint is of step {checkpoint.step}, beyond trainer.max_steps={steps}"
        raise ConfigErrors([Problem("trainer.max_steps", what, "give more steps, or an earlier checkpoint")])
    adapted, placed = placed_on_meta(config)
    epochs = config.trainer.get("num_train_epochs", 3.0)
    if steps <= 0 and trainer_state(checkpoint.folder)["epoch"] > epochs:
        what = f"the checkpoint is of epoch {trainer_state(checkpoint.folder)['epoch']:.3g}, beyond {epochs:g}"
        raise ConfigErrors([Problem("trainer.num_train_epochs", what, "give more epochs, or an earlier checkpoint")])
    groups: dict[str, list[str]] = {}
    for one in placed:
        groups.setdefault(one.group.name, []).append(one.record.name)
    try:
        refuse_other_groups(checkpoint.state, full_name(loraplus_settings(config).optimizer_class), groups)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint.folder / STATE} can't be read: {error}") from None
    refuse_other_tensors(checkpoint.folder, adapted)


def _refuse_to_replace(folder: Path) -> None:
    """Where no checkpoint counts a run begins anew, and that would replace what a finished or a damaged one has."""
    result = read_result(folder)
    damaged = checkpoints.sealed(folder / run_folder.CHECKPOINTS)
    if damaged or (result is not None and result.status == OK):
        what = f"no checkpoint of {folder} is whole" if damaged else f"the run in {folder} kept no checkpoint"
        fix = "it can't go on, and to begin anew would replace what it has: start a new run in another folder"
        raise ConfigErrors([Problem(KEY, what, fix)])


def _refuse_changes_at_the_end(checkpoint: Checkpoint, changed: tuple[str, ...]) -> None:
    """A run whose steps are all taken only has to be saved: what is changed of its training would do nothing."""
    planned = trainer_state(checkpoint.folder)["max_steps"]
    if checkpoint.step != planned or any(change.split(":")[0] in _LENGTHENING for change in changed):
        return
    if idle := [change for change in changed if change.split(".")[0] in _TRAINED_WITH]:
        what = f"all {planned} steps are taken, so this would change nothing: {'; '.join(idle)}"
        raise ConfigErrors([Problem("run", what, "give more steps (trainer.max_steps), or leave it as it was")])


def _changes(stored: Path, config: DictConfig) -> list[str]:
    """Leaf keys whose value differs between the stored config and this one, in words."""
    if not stored.is_file():
        return []
    then = flat(read_plain(stored))  # nothing in it is followed: it may be somebody else's
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    now = flat(plain)
    keys = [key for key in [*now, *(key for key in then if key not in now)] if key != KEY]
    told = {key: (then.get(key, "not set"), now.get(key, "not set")) for key in keys}
    changed = {key: values for key, values in told.items() if values[0] != values[1]}
    # A rule's ratio follows loraplus.ratio, and is told with it.
    others = [values for key, values in changed.items() if key.startswith("loraplus.") and not key.startswith(_RULES)]
    return [
        f"{key}: {old} -> {new}"
        for key, (old, new) in changed.items()
        if not (key.startswith(_RULES) and (old, new) in others)
    ]
