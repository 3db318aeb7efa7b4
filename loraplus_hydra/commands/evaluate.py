"""`evaluate`: the metrics of a finished run's adapter, on its own held-out rows again or on others."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra import paths
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.finished import FinishedRun, load_run, load_run_tokenizer, named_run, open_run, results

if TYPE_CHECKING:
    from loraplus_hydra.examples import Examples

_KIND_OF_LABELS = ("num_labels", "id2label", "problem_type")


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the metrics, and write them where `out` says. Raises UserError."""
    out = paths.new_file(config.out, key="out") if config.out else None
    data = {} if config.data is None else OmegaConf.to_container(config.data, resolve=False)
    assert isinstance(data, dict)
    overrides = {"model": config.model, "trainer": config.trainer}
    run = open_run(named_run(config), overrides, trust_remote_code=config.trust_remote_code, groups=())
    run.config.data = _data(run.config, data)
    run = _checked(run)
    try:
        metrics = evaluate(run)
    except ConfigErrors as error:
        raise ConfigErrors([_as_given(problem, data) for problem in error.problems]) from error
    for name, value in results(metrics).items():
        then = run.result["metrics"].get(name)
        print(f"{name} = {value:.6g}" + ("" if then is None else f" (at the end of training: {then:.6g})"))
    if out is not None:
        paths.write_text(out, json.dumps(metrics, indent=2) + "\n")
        print(f"The metrics lie in {out}")


def evaluate(run: FinishedRun) -> dict[str, float]:
    """The metrics of the run's adapter on the held-out rows of its config. Raises UserError."""
    from loraplus_hydra.assemble import make_trainer
    from loraplus_hydra.examples import load_examples

    tokenizer = load_run_tokenizer(run)
    examples = load_examples(run.config, tokenizer)
    _same_labels(run, examples)
    model, tokenizer = load_run(run, trainable=True)  # the Trainer makes its groups out of what trains
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run.config, Path(folder), model, tokenizer, examples)
        metrics: dict[str, float] = trainer.evaluate()
    return metrics


def _data(config: DictConfig, changes: dict[Any, Any]) -> Any:
    """The run's data with `changes`, or what replaces it.

    Only a classifier needs the training rows, for the labels' names; elsewhere those to evaluate on stand in for them.
    """
    data = changes if changes.get("_target_") else {**config.data, **changes}
    evaluated = changes.get("eval")
    if evaluated is not None and "train" not in _given(changes) and config.task.task_type != "SEQ_CLS":
        data["train"] = evaluated
    return data


def _as_given(problem: Problem, changes: dict[Any, Any]) -> Problem:
    """A Problem with the rows that stand in for the training rows, at the key that names them."""
    stands_in = problem.key == "data.train" and "train" not in _given(changes)
    return replace(problem, key="data.eval") if stands_in else problem


def _given(changes: dict[Any, Any]) -> set[Any]:
    return {key for key, value in changes.items() if value != "???"}


def _checked(run: FinishedRun) -> FinishedRun:
    from loraplus_hydra.check import stored_problems

    problems = stored_problems(run.config)
    if problems:
        raise ConfigErrors(problems)
    return run


def _same_labels(run: FinishedRun, examples: Examples) -> None:
    known = run.model_arguments()
    for name, value in examples.model_arguments.items():
        if name in _KIND_OF_LABELS and name in known and value != known[name]:
            what = f"the rows' {name} is {value}, but the run's model has {known[name]}"
            raise ConfigErrors([Problem("data", what, "evaluate on rows that have the run's labels")])
