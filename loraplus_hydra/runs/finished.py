"""A run opened from its folder: config, result and adapter.

The adapter is the final adapter or a checkpoint's. `load_finished` loads the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.check import stored_problems
from loraplus_hydra.config.identity import run_hash
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.config.types import fits
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, refuse
from loraplus_hydra.io import run_folder
from loraplus_hydra.io.checkpoint_state import trainer_state
from loraplus_hydra.io.checkpoints import Checkpoint, newest_complete, open_checkpoint, sealed, step_of
from loraplus_hydra.io.files import found_at
from loraplus_hydra.io.folders import refuse_links
from loraplus_hydra.io.read import Missing, Unreadable, read_json, refuse_large
from loraplus_hydra.io.result import INTERRUPTED, OK, Result, read_result, stored_result
from loraplus_hydra.runs.stored_config import KEY, named_run, read_stored

# The groups of a stored config that are needed to rebuild the model.
MODEL_GROUPS = ("model", "quantization", "adapter", "task", "seed")
# Attributes of a model's config that the task sets. They are stored in config.json in the adapter's folder.
_LABEL_SETTINGS = ("id2label", "label2id", "problem_type")
_FIX = "give the folder of a finished run"
NEWEST = "newest"  # value of `checkpoint` for the newest complete checkpoint
_NOT_RESULTS = ("runtime", "per_second", "preparation_time", "num_tokens", "epoch")


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, config, result and adapter (the final adapter or a checkpoint's)."""

    folder: Path
    config: DictConfig
    result: Mapping[str, Any]
    adapter: Path
    step: int | None = None  # step of the checkpoint; None for the final adapter
    allow_changed_inputs: bool = False

    def model_arguments(self) -> dict[str, Any]:
        """Return the attributes of the model's config that the task set: labels and their kind."""
        file = self.adapter / "config.json"
        try:
            stored = read_json(file)
            found = {name: stored[name] for name in _LABEL_SETTINGS if stored.get(name) is not None}
            if "id2label" in found:
                found["id2label"] = {int(number): name for number, name in found["id2label"].items()}
                found["num_labels"] = len(found["id2label"])
        except Unreadable as error:
            raise _no_run(str(error)) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise _no_run(f"{file} can't be read: {first_line(error)}") from error
        return found


def model_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's metrics without times and progress."""
    return {name: value for name, value in metrics.items() if not any(part in name for part in _NOT_RESULTS)}


def open_run(
    folder: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
    allow_changed_inputs: bool = False,
    groups: Iterable[str] | None = MODEL_GROUPS,
    checkpoint: str | None = None,
    ema: bool = False,
) -> FinishedRun:
    """Open the run in `folder`, with `overrides` (group -> keys) merged into its config.

    Without `checkpoint`, the run must have finished. With `newest` or a step, the checkpoint is opened, even if the run
    was stopped. With `ema`, the adapter is the average of a finished run's weights. The folder may be untrusted. So the
    `groups` of the config (None: all) are checked like any other config, except the rows. Targets must be allowed at
    their keys, and a model's own code runs only with `trust_remote_code`. With `allow_changed_inputs`, the run's base
    weights, adapter and rows may have changed. Raises ConfigErrors.
    """
    place = expanded(folder)
    _refuse_no_folder(place)
    if ema and checkpoint is not None:
        what = "a checkpoint's average is no adapter; only a finished run has one"
        raise ConfigErrors([Problem("ema", what, "set checkpoint=null, or ema=false")])
    name = run_folder.ADAPTER_EMA if ema else run_folder.ADAPTER
    found = None if checkpoint is None else _checkpoint(place, checkpoint)
    result = _finished_result(place, name) if found is None else {}
    config = read_stored(place / run_folder.CONFIG, overrides or {})
    problems = stored_problems(config, groups)
    if config.model.trust_remote_code and not trust_remote_code:
        what = "the run's model contains Python code (model.trust_remote_code)"
        problems.append(Problem("trust_remote_code", what, "read the code, then set trust_remote_code=true"))
    refuse(problems)
    if found is None:
        result = _of_average(result) if ema else result
        return FinishedRun(place, config, result, place / name, allow_changed_inputs=allow_changed_inputs)
    result = _result_at(found, place, config)
    return FinishedRun(place, config, result, found.folder, found.step, allow_changed_inputs)


def _of_average(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's result with the metrics of the average in place of those of the last weights.

    The answers and the training loss are those of the weights, so they are left out.
    """
    metrics = dict(result.get("metrics") or {})
    averaged = {name: value for name, value in metrics.items() if name.startswith("eval_ema_")}
    rest = {name: value for name, value in metrics.items() if name not in averaged}
    metrics = rest | {f"eval_{name[9:]}": value for name, value in averaged.items()}
    return {**result, "metrics": metrics, "samples": [], "train_loss": None}


def open_named_run(config: DictConfig, groups: Iterable[str] | None = MODEL_GROUPS) -> FinishedRun:
    """Open the run that the config of a command names, as the command's keys say. Raises ConfigErrors."""
    return open_run(
        named_run(config),
        {group: config[group] for group in ("model", "trainer") if group in config},
        trust_remote_code=config.trust_remote_code,
        allow_changed_inputs=config.allow_changed_inputs,
        groups=groups,
        checkpoint=config.checkpoint,
        ema=config.ema,
    )


def _refuse_no_folder(folder: Path) -> None:
    """Raise ConfigErrors if `folder` has no run's config."""
    if found_at(folder, KEY) is None or not folder.is_dir():
        raise _no_run(f"there is no folder {folder}")
    if not (folder / run_folder.CONFIG).is_file():
        runs = sorted(path.parent.name for path in folder.glob(f"*/{run_folder.CONFIG}"))
        hint = (
            f"it contains the runs {', '.join(runs[:5])}; give one of them"
            if runs
            else "give the folder of a finished run"
        )
        raise _no_run(f"{folder} is not a run's folder, because it has no {run_folder.CONFIG}", hint)


def _finished_result(folder: Path, name: str) -> dict[str, Any]:
    """Return a finished run's result.json.

    Raises ConfigErrors if the run has not finished, or has no adapter in its folder `name`.
    """
    try:
        result = stored_result(folder)
    except Missing:
        what = f"the run in {folder} hasn't finished: there is no {run_folder.RESULT}"
        raise _no_run(what, _advice(folder)) from None
    except Unreadable as error:
        raise _no_run(str(error)) from None
    if (status := result.get("status")) != OK:
        stored = result.get("error") or {}
        why = f" ({stored.get('type')}: {str(stored.get('text')).splitlines()[0]})" if stored.get("text") else ""
        raise _no_run(f"the run in {folder} ended as '{status}'{why}", _advice(folder))
    adapter = folder / name
    if name == run_folder.ADAPTER_EMA and not (adapter.is_symlink() or adapter.exists()):
        what = f"the run in {folder} has no average: there is no {name}"
        raise ConfigErrors([Problem("ema", what, "use ema=false; a run with trainer.ema=0.99 has an average")])
    if adapter.is_symlink() or not adapter.is_dir():
        raise _no_run(f"there is no {name} in {folder}" + (", but a link" if adapter.is_symlink() else ""))
    refuse_links(adapter, KEY, reading=True)  # checked before other libraries open the files
    try:
        refuse_large(sorted(adapter.iterdir()))
    except Unreadable as error:
        raise _no_run(str(error)) from None
    return result


def _advice(folder: Path) -> str:
    """Return advice about a run that has not finished."""
    kept = [str(step_of(place)) for place in sealed(folder / run_folder.CHECKPOINTS)]
    if not kept:
        return _FIX
    return f"resume it, or open a checkpoint: checkpoint={NEWEST} (the steps are {', '.join(kept)})"


def _checkpoint(folder: Path, named: str) -> Checkpoint:
    """Return the newest complete checkpoint, or the checkpoint of a step. Raises ConfigErrors."""
    place = folder / run_folder.CHECKPOINTS
    refuse_links(place, KEY, reading=True)  # checked before other libraries open the files
    steps = [step_of(each) for each in sealed(place)]
    wanted = named.removeprefix("checkpoint-")
    try:
        if named == NEWEST and (newest := newest_complete(place)[0]) is not None:
            return newest
        if wanted.isdecimal() and int(wanted) in steps:
            return open_checkpoint(place / f"checkpoint-{int(wanted)}")
    except ValueError as why:
        raise ConfigErrors([Problem("checkpoint", f"{named} is incomplete: {why}", f"use {NEWEST}")]) from None
    what = f"{place} has no complete checkpoint" + ("" if named == NEWEST else f" '{named}'")
    fix = (
        f"use {NEWEST}, or one of the steps {', '.join(map(str, steps))}"
        if steps
        else "resume the run, or start it again"
    )
    raise ConfigErrors([Problem("checkpoint", what, fix)])


def _result_at(checkpoint: Checkpoint, folder: Path, config: DictConfig) -> dict[str, Any]:
    """Return the result of a run that ended at `checkpoint`, with the entries that its files have."""
    log = trainer_state(checkpoint.folder).log_history
    stored = read_result(folder) or Result(INTERRUPTED, str(config.task.metric))
    shown = replace(
        stored,
        metrics=_evaluation(log, checkpoint.step),
        metrics_before=_evaluation(log, 0),
        train_loss=None,
        samples=[],
        steps=checkpoint.step,
        seconds=checkpoint.state.seconds,
        seed=config.seed,
        config_hash=run_hash(config),
        inputs=checkpoint.state.inputs,
    )
    return asdict(shown)


def _evaluation(log: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Return the metrics of the evaluation at `step`; empty if there was no evaluation."""
    return {
        name: value
        for entry in log
        if entry["step"] == step
        for name, value in entry.items()
        if name.startswith("eval_") and fits(value, float)
    }


def _no_run(what: str, fix: str = _FIX) -> ConfigErrors:
    return ConfigErrors([Problem(KEY, what, fix)])
