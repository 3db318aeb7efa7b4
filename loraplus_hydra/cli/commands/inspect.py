"""`inspect`: show each trained tensor's role, rule, group and rate, without loading weights."""

from __future__ import annotations

import json

from omegaconf import DictConfig

from loraplus_hydra.check import check
from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.loraplus.plan import table_rows
from loraplus_hydra.runs import display


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print a config's table of rates.

    `--tensors` lists each tensor with the reason for its rate, and `--json` prints JSON.
    """
    checked = check(run_of(config), with_data=False)
    from loraplus_hydra.runs.inspection import inspect

    found = inspect(checked)
    if "json" in flags:
        print(json.dumps(found.as_dict(), indent=2))
        return
    display.show_rates(table_rows(found.plan))
    if "tensors" in flags:
        display.show_tensors(found.plan.tensors)
    display.show_memory(found.memory, found.step)
    print(f"{found.trained:,} of {found.total:,} parameters are trained ({found.trained / found.total:.2%}).")
    for line in found.explanation:
        print(line)
    for sentence in found.advice:
        print(f"Note: {sentence}")


COMMAND = Command(
    "inspect",
    "show each trained tensor's rate, and the memory of training; loads no weights",
    main,
    usage="[--tensors] [--json]",
    flags=("tensors", "json"),
)
