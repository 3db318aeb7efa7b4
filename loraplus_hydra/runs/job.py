"""One job: a config in, a trained adapter and a result out."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.check import check
from loraplus_hydra.config.identity import run_hash
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import files, processes, run_folder, screen
from loraplus_hydra.io.checkpoints import ResumePoint, sealed
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.quiet_libraries import quiet_libraries, quiet_loading
from loraplus_hydra.io.result import FAILED, INTERRUPTED, OK, Result, read_result, versions
from loraplus_hydra.runs import display
from loraplus_hydra.runs.limits import explained
from loraplus_hydra.runs.resume import asked, find, finished, prepare, told_as_finished
from loraplus_hydra.training.hf_trainer.train import _train
from loraplus_hydra.training.prepare import _load_model
from loraplus_hydra.training.trackers.tracking import Tracking

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def run(config: DictConfig, folder: str | Path | None = None) -> Result:
    """Train one adapter as `config` (a composed `run`) says, and write everything into `folder`.

    `folder` is by default the one that Hydra made for the job. With `trainer.resume_from_checkpoint` the run goes on
    from a checkpoint; one that has finished with this config is left as it is. Returns the result; `result.value` is
    the metric that a sweep optimises. Raises ConfigErrors before anything heavy when the config is wrong; whatever else
    goes wrong is raised after it is written into result.json.
    """
    quiet_libraries()
    config = run_of(config)
    folder = processes.shared_folder(Path(folder) if folder is not None else _hydra_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        if (done := finished(config, folder)) is not None:
            screen.show(told_as_finished(folder, done))
            return done
        point = _resume_point(config, folder)
        tracking = Tracking()
        with _recorded(config, folder, point, tracking) as result, explained(config, folder):
            _run(config, folder, result, point, tracking)
    if processes.is_main():
        _report(folder, result)
    return result


def _run(config: DictConfig, folder: Path, result: Result, point: ResumePoint | None, tracking: Tracking) -> None:
    screen.show("1/6 Checking the config")
    if point is None:  # else it was checked before the folder was looked at
        check(config)
    quiet_loading()
    _describe(config, folder, result, point)
    tracking.start(config, folder, resumed_at=None if point is None else point.step)

    from loraplus_hydra.models.tokenizer import load_tokenizer
    from loraplus_hydra.tasks.examples import load_examples
    from loraplus_hydra.training.hf_trainer.assemble import make_trainer  # heavy

    screen.show("2/6 Loading the data and the tokenizer")
    tokenizer = load_tokenizer(config.model)
    examples = load_examples(config, tokenizer)
    screen.show(f"    {examples.counts()}")
    for note in examples.notes:
        screen.show(f"    Note: {note}")

    screen.show("3/6 Loading the model and adding the adapter")
    model = _load_model(config, tokenizer, examples)

    screen.show("4/6 Deciding which tensor gets which rate")
    trainer = make_trainer(config, folder, model, tokenizer, examples, point, tracking.log)
    _show_and_write_groups(folder, trainer)

    screen.show("5/6 Training")
    _train(config, trainer, examples, result, point)

    screen.show("6/6 Saving the adapter")
    if processes.is_main():
        _save(folder, model, tokenizer)


def _resume_point(config: DictConfig, folder: Path) -> ResumePoint | None:
    """What the run goes on from, found before anything in its folder is changed."""
    if not asked(config):
        return None
    check(config)
    return find(config, folder)


def _hydra_folder() -> Path:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


@contextmanager
def _recorded(config: DictConfig, folder: Path, point: ResumePoint | None, tracking: Tracking) -> Iterator[Result]:
    """A Result that lands in `folder`, and that `tracking` is told, however the job ends."""
    started = time.perf_counter() - (0.0 if point is None else point.seconds)
    result = Result(status=FAILED, metric=str(OmegaConf.select(config, "task.metric")), versions=versions())
    try:
        yield result
        result.status = OK
    except KeyboardInterrupt:
        result.status = INTERRUPTED
        _say_how_to_go_on(folder)
        raise
    except (Exception, SystemExit) as error:
        result.error = {"type": type(error).__name__, "text": str(error)}
        _say_how_to_go_on(folder)
        raise
    finally:
        result.seconds = round(time.perf_counter() - started, 3)
        if processes.is_main():
            _write(config, result, folder)
        tracking.finish(result)


def _write(config: DictConfig, result: Result, folder: Path) -> None:
    """result.json; where even that can't be written, what ended the job is told all the same."""
    try:
        with explained(config, folder):
            result.write(folder)
    except (OSError, UserError) as error:
        if result.status == OK:
            raise
        screen.show(f"{run_folder.RESULT} could not be written: {error}")


def _say_how_to_go_on(folder: Path) -> None:
    checkpoints = sealed(folder / run_folder.CHECKPOINTS)
    if checkpoints and processes.is_main():
        command = f"python -m loraplus_hydra resume {shlex.quote(str(folder))}"
        screen.show(f"The last checkpoint is {checkpoints[-1].name}; to go on: {command}")


def _describe(config: DictConfig, folder: Path, result: Result, point: ResumePoint | None) -> None:
    """Write and show the whole resolved config, and put its hash and seed into `result`.

    Of a run that goes on it says from where, and with what that has changed since.
    """
    result.seed = config.seed
    result.config_hash = run_hash(config)
    if not processes.is_main():
        return
    if point is not None:
        previous = read_result(folder)
        if point.checkpoint or previous or (folder / run_folder.METRICS).is_file():  # else this is its first start
            at = f"going on from step {point.step}" if point.checkpoint else "no checkpoint counts: from step 0"
            screen.show(f"    Resuming: {at}")
            result.resumed_at = [*(previous.resumed_at if previous else ()), point.step]
        for change in point.changed:
            screen.show(f"    Changed since: {change}")
        if previous is not None:  # what was said of its end no longer holds
            replace(result, status=INTERRUPTED).write(folder)
        prepare(point, folder)
    files.write_text(folder / run_folder.CONFIG, OmegaConf.to_yaml(config, resolve=True))
    display.show_config(OmegaConf.to_container(config, resolve=True))


def _show_and_write_groups(folder: Path, trainer: Any) -> None:
    """The table that `inspect` shows, and param_groups.json: every trained tensor, role, rule, group and rate."""
    from loraplus_hydra.loraplus.advice import ratio_advice
    from loraplus_hydra.loraplus.plan import largest_ratio, place, rows
    from loraplus_hydra.loraplus.roles import tensor_records

    if not processes.is_main():
        return
    placed = place(tensor_records(trainer.model), trainer.loraplus)
    display.show_overview(rows(placed))
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    for sentence in ratio_advice([one.record for one in placed], largest_ratio(placed), total):
        screen.show(f"    Note: {sentence}")
    table = [
        {
            "name": one.record.name,
            "role": one.record.role,
            "rule": one.rule.name,
            "group": one.group.name,
            "shape": list(one.record.shape),
            "lr": one.group.lr,
            "weight_decay": one.group.weight_decay,
        }
        for one in placed
    ]
    files.write_text(folder / run_folder.PARAM_GROUPS, json.dumps(table, indent=2) + "\n")


def _save(folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """adapter/ in PEFT's own layout with the tokenizer, there whole or not at all."""
    from loraplus_hydra.models.adapter_files import save_adapter

    draft = files.unfinished(folder / run_folder.ADAPTER)
    save_adapter(model, tokenizer, draft)
    files.replace_folder(draft, folder / run_folder.ADAPTER)


def _report(folder: Path, result: Result) -> None:
    from loraplus_hydra.runs.figure import draw_training

    draw_training(folder / run_folder.METRICS, folder / run_folder.FIGURE)
    display.show_result(folder, result)
