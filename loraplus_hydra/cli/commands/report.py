"""`report`: make a sweep's table, page and figures again from its folder."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import interrupts


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Write the report into the sweep's folder and show it. Raises UserError."""
    if OmegaConf.is_missing(config, "folder"):
        raise ConfigErrors([Problem("folder", "no sweep is named", "write its folder behind the command")])
    from loraplus_hydra.report.terminal import show
    from loraplus_hydra.report.write import write_report

    with interrupts.notice("the report is left unfinished after the current figure"):
        show(write_report(Path(config.folder).expanduser()))


COMMAND = Command(
    "report",
    "make a sweep's table, page and figures again from its folder",
    main,
    usage="DIR",
    config="report",
    positional="folder",
)
