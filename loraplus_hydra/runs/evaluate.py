"""Metrics of a finished run's adapter, on the run's held-out rows or on other rows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.check import stored_problems
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, Problem, refuse
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.fingerprints import refuse_changed
from loraplus_hydra.models.adapter_files import load_tensors
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.load_finished import base_of, load_run, load_run_tokenizer, load_start
from loraplus_hydra.runs.new_rows import named_rows
from loraplus_hydra.runs.predict import on_device
from loraplus_hydra.tasks.examples import Examples, load_examples
from loraplus_hydra.training.forgetting import OtherText, read_pieces
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.prepare import bundle
from loraplus_hydra.training.reference import adds_reference

_KIND_OF_LABELS = ("num_labels", "id2label", "problem_type")


def evaluate_on(run: FinishedRun, data: dict[Any, Any], *, forgetting: str | None = None) -> dict[str, float]:
    """Return the metrics of the run's adapter on the rows of `data`.

    `data` changes or replaces the `data` group of `run.config`. The new config is checked as a whole. `forgetting` is a
    file with other rows, for the change of their loss against the base model. Raises UserError.
    """
    before = run.config.data.copy()  # because the assignment changes the node itself
    run.config.data = _data(run.config, data)
    try:
        refuse(stored_problems(run.config))
        names_new_rows = "data.eval" in named_rows(data, before, run.config.data)
        return evaluate(run, names_new_rows=names_new_rows, forgetting=forgetting)
    except ConfigErrors as error:
        raise ConfigErrors(dict.fromkeys(_as_given(each, data, run.config) for each in error.problems)) from error


def evaluate(run: FinishedRun, *, names_new_rows: bool = False, forgetting: str | None = None) -> dict[str, float]:
    """Return the metrics of the run's adapter on the held-out rows of its config.

    `names_new_rows` is True if the config sets other rows for evaluation than the run had. `forgetting` is a file with
    other rows. Raises UserError.
    """
    tokenizer = load_run_tokenizer(run)
    if "chat_template_path" in run.config.task.args:  # the run's tokenizer has the template that it was trained with
        run.config.task.args.chat_template_path = None
    other = None if forgetting is None else OtherText(read_pieces(forgetting, run.config, tokenizer))
    examples = load_examples(_with_stored_head(run), tokenizer, base_of(run))
    if not (names_new_rows or run.allow_changed_inputs):
        refuse_changed(run.result.get("inputs") or {}, examples.fingerprints, names=["data.eval"])
    _same_labels(run, examples)
    interrupts.stop_if_asked()
    has_reference = adds_reference(locate(run.config.task._target_))
    if has_reference:
        model = load_start(run, tokenizer, examples, other)
    else:  # trainable, because the Trainer makes parameter groups from the trained tensors
        model, tokenizer = load_run(run, trainable=True, other=other)
    run.config.trainer.ema = None  # the run's weights or their average, not another average
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(bundle(run.config, tokenizer, examples, model), Path(folder))
        if has_reference:  # the Trainer has copied the start, with which the run compared its model
            load_tensors(model, run.adapter)
        change = {} if other is None else other.change(on_device(model, run), run.config)
        metrics: dict[str, float] = trainer.evaluate()
    return metrics | change


def _with_stored_head(run: FinishedRun) -> DictConfig:
    """Return the run's config, with the number and kind of labels of the trained head."""
    config = run.config.copy()
    if "new_head" in config.task:
        config.task.new_head = False
    if "problem_type" in config.task and (kind := run.model_arguments().get("problem_type")):
        config.task.problem_type = kind
    return config


def _data(config: DictConfig, changes: dict[Any, Any]) -> Any:
    """Return the run's `data` group with `changes`, or the option that replaces it."""
    data = {**({} if changes.get("_target_") else config.data), **changes}
    if "train" in data and _stand_in(changes):
        data["train"] = changes["eval"]
    return data


def _stand_in(changes: dict[Any, Any]) -> bool:
    """Return True if the evaluation rows are also used as training rows.

    An evaluation needs no training rows, but a data set must have some.
    """
    return changes.get("eval") is not None and changes.get("train", "???") == "???"


def _as_given(problem: Problem, changes: dict[Any, Any], config: DictConfig) -> Problem:
    """Return a Problem with the key that the user typed."""
    if problem.key == "data.train" and _stand_in(changes):
        return replace(problem, key="data.eval")
    if problem.key == "data.eval" and "train" not in config.data:  # the run's rows were not from files
        return replace(problem, fix="choose another option: data=jsonl data.eval=...")
    return problem


def _same_labels(run: FinishedRun, examples: Examples) -> None:
    known = run.model_arguments()
    for name, value in examples.model_arguments.items():
        if name in _KIND_OF_LABELS and name in known and value != known[name]:
            what = f"the rows' {name} is {value}, but the run's model has {known[name]}"
            raise ConfigErrors([Problem("data", what, "use rows that have the run's labels")])
