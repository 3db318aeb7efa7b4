"""`evaluate`: print the metrics of a finished run's adapter.

The rows are the run's held-out rows or other rows.
"""

from __future__ import annotations

import json

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.io import files, interrupts
from loraplus_hydra.runs.finished import model_metrics, open_named_run


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the metrics, and write them to the file `out` if it is set. Raises UserError."""
    if not config.out:
        _print_metrics(config)
        return
    with files.reserved(config.out, key="out") as out:
        files.write_text(out, json.dumps(_print_metrics(config), indent=2) + "\n")
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


COMMAND = Command(
    "evaluate",
    "evaluate a finished run on its held-out rows or on other rows",
    main,
    usage="RUN [data=jsonl data.eval=...]",
    config="evaluate",
    positional="run",
    changes=("model", "data", "trainer"),
)
