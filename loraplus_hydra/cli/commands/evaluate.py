"""`evaluate`: the metrics of a finished run's adapter, on its own held-out rows again or on others."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import files
from loraplus_hydra.io.files import refuse_unwritable
from loraplus_hydra.runs.finished import FinishedRun, load_run, load_run_tokenizer, named_run, open_run, results

if TYPE_CHECKING:
    from loraplus_hydra.tasks.examples import Examples

_KIND_OF_LABELS = ("num_labels", "id2label", "problem_type")


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the metrics, and write them where `out` says. Raises UserError."""
    out = files.new_file(config.out, key="out") if config.out else None
    if out is not None:
        refuse_unwritable(out.parent, key="out")
    data = {} if config.data is None else OmegaConf.to_container(config.data, resolve=False)
    assert isinstance(data, dict)
    overrides = {"model": config.model, "trainer": config.trainer}
    run = open_run(named_run(config), overrides, trust_remote_code=config.trust_remote_code, groups=())
    run.config.data = _data(run.config, data)
    try:
        _refuse_wrong(run.config)
        metrics = evaluate(run)
    except ConfigErrors as error:
        told = [_as_given(problem, data, run.config) for problem in error.problems]
        raise ConfigErrors(dict.fromkeys(told)) from error
    for name, value in results(metrics).items():
        then = run.result["metrics"].get(name)
        print(f"{name} = {value:.6g}" + ("" if then is None else f" (at the end of training: {then:.6g})"))
    if out is not None:
        files.write_text(out, json.dumps(metrics, indent=2) + "\n")
        print(f"The metrics lie in {out}")


def evaluate(run: FinishedRun) -> dict[str, float]:
    """The metrics of the run's adapter on the held-out rows of its config. Raises UserError."""
    from loraplus_hydra.tasks.examples import load_examples
    from loraplus_hydra.training.hf_trainer.assemble import make_trainer
    from loraplus_hydra.training.prepare import bundle

    tokenizer = load_run_tokenizer(run)
    examples = load_examples(run.config, tokenizer)
    _same_labels(run, examples)
    model, tokenizer = load_run(run, trainable=True)  # the Trainer makes its groups out of what trains
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(bundle(run.config, tokenizer, examples, model), Path(folder))
        metrics: dict[str, float] = trainer.evaluate()
    return metrics


def _data(config: DictConfig, changes: dict[Any, Any]) -> Any:
    """The run's data with `changes`, or what replaces it."""
    data = {**({} if changes.get("_target_") else config.data), **changes}
    if "train" in data and _stand_in(config, changes):
        data["train"] = changes["eval"]
    return data


def _stand_in(config: DictConfig, changes: dict[Any, Any]) -> bool:
    """Whether the rows to evaluate on stand in for training rows, which only a classifier needs: for the labels."""
    named = changes.get("eval") is not None and changes.get("train", "???") == "???"
    return named and config.task.task_type != "SEQ_CLS"


def _as_given(problem: Problem, changes: dict[Any, Any], config: DictConfig) -> Problem:
    """A Problem as it is with what the user wrote."""
    if problem.key == "data.train" and _stand_in(config, changes):
        return replace(problem, key="data.eval")
    if problem.key == "data.eval" and "train" not in config.data:  # the run's rows came from no file
        return replace(problem, fix="name another option: data=jsonl data.eval=...")
    return problem


def _refuse_wrong(config: DictConfig) -> None:
    from loraplus_hydra.check import stored_problems

    if problems := stored_problems(config):
        raise ConfigErrors(problems)


def _same_labels(run: FinishedRun, examples: Examples) -> None:
    known = run.model_arguments()
    for name, value in examples.model_arguments.items():
        if name in _KIND_OF_LABELS and name in known and value != known[name]:
            what = f"the rows' {name} is {value}, but the run's model has {known[name]}"
            raise ConfigErrors([Problem("data", what, "evaluate on rows that have the run's labels")])
