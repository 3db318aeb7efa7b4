"""`check`: list all errors of a config, without training."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check
from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.io.text import visible


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Raise ConfigErrors for a config with errors; otherwise print a confirmation."""
    for note in check(run_of(config)).notes:
        print(visible(f"Note: {note}"))
    print("The config has no errors. Everything that can be checked before the weights are loaded has been checked.")


COMMAND = Command("check", "list all errors of the config; trains nothing", main)
