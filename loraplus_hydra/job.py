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

from loraplus_hydra import paths, processes, screen
from loraplus_hydra.check import check
from loraplus_hydra.checkpoints import sealed
from loraplus_hydra.errors import UserError
from loraplus_hydra.limits import explained
from loraplus_hydra.quiet import quiet_libraries, quiet_loading
from loraplus_hydra.results import FAILED, INTERRUPTED, OK, Result, read_result, run_hash, versions
from loraplus_hydra.resume_point import ResumePoint, asked, find, finished, prepare, told_as_finished
from loraplus_hydra.schema import run_of
from loraplus_hydra.trackers.tracking import Tracking

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from loraplus_hydra.examples import Examples


def run(config: DictConfig, folder: str | Path | None = None) -> Result:
    """Train one adapter as `config` (a composed `run`) says, and write everything into `folder`.

    `folder` is by default the one that Hydra made for the job. With `trainer.resume_from_checkpoint` the run goes on
    from a checkpoint; one that has finished with this config is left as it is. Returns the result; `result.value` is
    the metric that a sweep optimises. Raises ConfigErrors before anything heavy when the config is wrong; whatever else
    goes wrong is raised after it is written into result.json.
    """
    quiet_libraries()
    config = run_of(config)
    folder = processes.agree_on(Path(folder) if folder is not None else _hydra_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with processes.alone_in(folder):
        if (done := finished(config, folder)) is not None:
            screen.say(told_as_finished(folder, done))
            return done
        point = _resume_point(config, folder)
        tracking = Tracking()
        with _recorded(config, folder, point, tracking) as result, explained(config, folder):
            _run(config, folder, result, point, tracking)
    if processes.is_main():
        _report(folder, result)
    return result


def _run(config: DictConfig, folder: Path, result: Result, point: ResumePoint | None, tracking: Tracking) -> None:
    screen.say("1/6 Checking the config")
    if point is None:  # else it was checked before the folder was looked at
        check(config)
    quiet_loading()
    _describe(config, folder, result, point)
    tracking.start(config, folder, resumed_at=None if point is None else point.step)

    from loraplus_hydra.assemble import make_trainer  # heavy
    from loraplus_hydra.examples import load_examples
    from loraplus_hydra.tokenizer import load_tokenizer

    screen.say("2/6 Loading the data and the tokenizer")
    tokenizer = load_tokenizer(config.model)
    examples = load_examples(config, tokenizer)
    screen.say(f"    {examples.counts()}")
    for note in examples.notes:
        screen.say(f"    Note: {note}")

    screen.say("3/6 Loading the model and adding the adapter")
    model = _load_model(config, tokenizer, examples)

    screen.say("4/6 Deciding which tensor gets which rate")
    trainer = make_trainer(config, folder, model, tokenizer, examples, point, tracking.tell)
    _show_and_write_groups(folder, trainer)

    screen.say("5/6 Training")
    _train(config, trainer, examples, result, point)

    screen.say("6/6 Saving the adapter")
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
        screen.say(f"{paths.RESULT} could not be written: {error}")


def _say_how_to_go_on(folder: Path) -> None:
    checkpoints = sealed(folder / paths.CHECKPOINTS)
    if checkpoints and processes.is_main():
        command = f"python -m loraplus_hydra resume {shlex.quote(str(folder))}"
        screen.say(f"The last checkpoint is {checkpoints[-1].name}; to go on: {command}")


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
        if point.checkpoint or previous or (folder / paths.METRICS).is_file():  # else this is its first start
            at = f"going on from step {point.step}" if point.checkpoint else "no checkpoint counts: from step 0"
            screen.say(f"    Resuming: {at}")
            result.resumed_at = [*(previous.resumed_at if previous else ()), point.step]
        for change in point.changed:
            screen.say(f"    Changed since: {change}")
        if previous is not None:  # what was said of its end no longer holds
            replace(result, status=INTERRUPTED).write(folder)
        prepare(point, folder)
    paths.write_text(folder / paths.CONFIG, OmegaConf.to_yaml(config, resolve=True))
    screen.show_config(OmegaConf.to_container(config, resolve=True))


def _load_model(config: DictConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> PeftModel:
    from transformers import set_seed

    from loraplus_hydra.adapter import add_adapter
    from loraplus_hydra.model import load_base
    from loraplus_hydra.tokenizer import new_token_ids

    set_seed(config.seed)  # the adapter's initialisation
    return add_adapter(
        load_base(config, tokenizer, examples.model_arguments),
        config.adapter,
        config.task.task_type,
        new_tokens=new_token_ids(tokenizer, config.model),
        revision=config.model.revision,
    )


def _show_and_write_groups(folder: Path, trainer: Any) -> None:
    """The table that `inspect` shows, and param_groups.json: every trained tensor, role, rule, group and rate."""
    from loraplus_hydra.advice import ratio_advice
    from loraplus_hydra.overview import largest_ratio, place, rows
    from loraplus_hydra.roles import tensor_records

    if not processes.is_main():
        return
    placed = place(tensor_records(trainer.model), trainer.loraplus)
    screen.show_overview(rows(placed))
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    for sentence in ratio_advice([one.record for one in placed], largest_ratio(placed), total):
        screen.say(f"    Note: {sentence}")
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
    paths.write_text(folder / paths.PARAM_GROUPS, json.dumps(table, indent=2) + "\n")


def _train(
    config: DictConfig, trainer: Any, examples: Examples, result: Result, point: ResumePoint | None = None
) -> None:
    """Evaluate, train, evaluate; everything measured goes into `result`."""
    from transformers import set_seed

    from loraplus_hydra.interrupts import StopAtStep, finishing_the_step
    from loraplus_hydra.measure import count_parameters, peak_memory_bytes
    from loraplus_hydra.sampling import answers

    result.device = str(trainer.args.device)
    result.trained_parameters, result.total_parameters = count_parameters(trainer.model)
    before = answers(trainer.model, trainer.processing_class, examples.rendered, config.task.sample_tokens)
    set_seed(config.seed)  # data order and dropout: the same whatever was evaluated before
    trainer.add_callback(stop := StopAtStep())
    try:
        with finishing_the_step(stop):
            trained = trainer.train_or_restore(None if point is None else point.folder)
    finally:
        result.steps = trainer.state.global_step
        result.metrics_before = evaluation_at(trainer.state, 0)
    result.train_loss = trained.training_loss
    result.train_seconds = trained.metrics["train_runtime"] + (0.0 if point is None else point.seconds)
    result.metrics = evaluation_at(trainer.state, trainer.step_of_model) or trainer.evaluate()
    result.best = best_evaluation(trainer.state.log_history, config.task.metric, config.task.greater_is_better)
    result.peak_memory_bytes = peak_memory_bytes(trainer.args.device)
    after = answers(trainer.model, trainer.processing_class, examples.rendered, config.task.sample_tokens)
    result.samples = [
        {"prompt": prompt, "reference": reference, "before": old, "after": new}
        for prompt, reference, old, new in zip(examples.prompts, examples.references, before, after, strict=True)
    ]


def evaluation_at(state: Any, step: int) -> dict[str, float]:
    """The metrics of the last evaluation right at `step`, or nothing if there was none."""
    entries = [entry for entry in state.log_history if entry["step"] == step and "eval_loss" in entry]
    return {key: value for key, value in entries[-1].items() if key != "step"} if entries else {}


def best_evaluation(history: list[dict[str, Any]], metric: str, greater_is_better: bool) -> dict[str, Any]:
    """Step and value of the best evaluation in a Trainer's log, the earliest of equals."""
    evaluations = [entry for entry in history if metric in entry]
    if not evaluations:
        return {}
    best = (max if greater_is_better else min)(evaluations, key=lambda entry: entry[metric])
    return {"step": best["step"], "value": best[metric]}


def _save(folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """adapter/ in PEFT's own layout with the tokenizer, there whole or not at all."""
    from loraplus_hydra.adapter_folder import save_adapter

    draft = paths.unfinished(folder / paths.ADAPTER)
    save_adapter(model, tokenizer, draft)
    paths.replace_folder(draft, folder / paths.ADAPTER)


def _report(folder: Path, result: Result) -> None:
    from loraplus_hydra.report.figure import draw_training

    draw_training(folder / paths.METRICS, folder / paths.FIGURE)
    screen.show_result(folder, result)
