"""`evaluate`: print the metrics of a finished run's adapter.

The rows are the run's held-out rows, other rows, or those of benchmark tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.cli.commands.command import Command, range_problems
from loraplus_hydra.config.command_schemas import EvaluateConfig
from loraplus_hydra.errors import Problem, refuse
from loraplus_hydra.io import files, folders, interrupts, run_folder
from loraplus_hydra.io.result import finite
from loraplus_hydra.io.screen import console, table
from loraplus_hydra.runs.finished import FinishedRun, model_metrics, open_named_run
from loraplus_hydra.runs.stored_config import unnamed_run


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the metrics, and write them to the file `out` if it is set. Raises UserError."""
    if config.harness:
        _evaluate_tasks(config)
        return
    refuse(
        Problem(key, "without `harness` it has no effect", "set harness=[TASK], or leave it out")
        for key in ("harness_tasks", "harness_limit", "harness_batch_size", "harness_chat")
        if config[key] != getattr(EvaluateConfig, key)
    )
    if not config.out:
        _print_metrics(config)
        return
    with files.reserved(config.out, key="out") as out:
        files.write_text(out, json.dumps(finite(_print_metrics(config)), indent=2) + "\n")
    print(f"The metrics are in {out}")


def _print_metrics(config: DictConfig) -> dict[str, float]:
    """Evaluate the run, print its metrics and those at the end of training, and return the new ones."""
    data = {} if config.data is None else OmegaConf.to_container(config.data, resolve=False)
    assert isinstance(data, dict)
    run = open_named_run(config, groups=())
    from loraplus_hydra.runs.evaluate import evaluate_on

    with interrupts.notice("the current batch is finished, but no metrics are written"):
        metrics = evaluate_on(run, data, forgetting=config.forgetting)
    when = "at the end of training" if run.step is None else f"in training at step {run.step}"
    for name, value in model_metrics(metrics).items():
        then = run.result["metrics"].get(name)
        print(f"{name} = {value:.6g}" + ("" if then is None else f" ({when}: {then:.6g})"))
    return metrics


def _evaluate_tasks(config: DictConfig) -> None:
    """Evaluate the run on tasks of lm-evaluation-harness, write the results, and print a table of them."""
    refuse([*unnamed_run(config), *range_problems(config, EvaluateConfig), *_not_of_tasks(config)])
    run = open_named_run(config)
    if config.out:
        with files.reserved(config.out, key="out") as out:
            _write_results(out, run, config)
        return
    out = run.folder / run_folder.HARNESS / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}.json"
    folders.refuse_links(run.folder, "run")
    files.refuse_unwritable(out.parent, key="run")
    _write_results(out, run, config)


def _not_of_tasks(config: DictConfig) -> Iterator[Problem]:
    """Yield a Problem for each key that changes only an evaluation on rows."""
    for key in ("data", "forgetting"):
        if config[key]:
            yield Problem(
                key, "with `harness` no rows are evaluated", f"leave it out, or evaluate {key} in a second call"
            )


def _write_results(out: Path, run: FinishedRun, config: DictConfig) -> None:
    from loraplus_hydra.runs.harness import Settings, evaluate_tasks, table_rows

    settings = Settings(
        list(config.harness),
        folder=config.harness_tasks,
        limit=config.harness_limit,
        batch_size=config.harness_batch_size,
        chat=config.harness_chat,
    )
    with interrupts.notice("the current batch is finished, and no results are written unless it was the last"):
        results = evaluate_tasks(run, settings)
    folders.make_folder(out.parent)
    files.write_text(out, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    columns = ("task", "metric", "filter", "value", "standard error", "shots", "rows")
    console().print(table(columns, table_rows(results), right=columns[3:]))
    print(f"The results are in {out}")


COMMAND = Command(
    "evaluate",
    "evaluate a finished run on its held-out rows or on other rows",
    main,
    usage="RUN [data=jsonl data.eval=... | harness=[...]]",
    config="evaluate",
    positional="run",
    verbatim=("out", "harness_tasks", "forgetting"),
    changes=("model", "data", "trainer"),
)
