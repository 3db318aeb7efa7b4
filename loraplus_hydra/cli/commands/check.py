"""`check`: list every error of a config; nothing is trained."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check
from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.io.text import visible


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Raise ConfigErrors for a config with errors; print a confirmation otherwise."""
    for note in check(run_of(config)).notes:
        print(visible(f"Note: {note}"))
    print("The config is right: everything that can be known before weights load has been checked.")


COMMAND = Command("check", "list every error of the config; trains nothing", main)
