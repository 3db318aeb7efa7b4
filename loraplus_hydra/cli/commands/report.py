"""`report`: write a sweep's table, page and figures again."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import interrupts


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Write the report into the sweep's folder, and show its tables. Raises UserError."""
    if OmegaConf.is_missing(config, "folder"):
        raise ConfigErrors([Problem("folder", "no sweep's folder is given", "write the folder after the command")])
    from loraplus_hydra.report.terminal import show
    from loraplus_hydra.report.write import write_report

    with interrupts.notice("the report stops after the current figure and is incomplete"):
        show(write_report(expanded(config.folder)))


COMMAND = Command(
    "report",
    "write a sweep's table, page and figures again",
    main,
    usage="DIR",
    config="report",
    positional="folder",
)
