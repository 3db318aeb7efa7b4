"""`check`: list all errors of a config, and estimate its memory, without training."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check
from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.io.text import visible


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Raise ConfigErrors for a config with errors; otherwise print the memory of training.

    With `trial`, two steps are trained, and their time and memory are printed.
    """
    checked = check(run_of(config))
    for note in checked.notes:
        print(visible(f"Note: {note}"))
    print("The config has no errors. Everything that can be checked before the weights are loaded has been checked.")
    from loraplus_hydra.runs import display
    from loraplus_hydra.runs.inspection import memory_on_own_rows

    display.show_memory(*memory_on_own_rows(checked))
    if "trial" in flags:
        from loraplus_hydra.runs.trial import try_steps

        print(try_steps(checked.config).as_text())


COMMAND = Command(
    "check",
    "list all errors of the config, and estimate its memory; trains nothing without trial=true",
    main,
    usage="[trial=true]",
    flags=("trial",),
)
