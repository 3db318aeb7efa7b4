"""`report`: write a sweep's table, page and figures again."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.files import found_at


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Write the report into the sweep's folder, and show its tables. Raises UserError."""
    if OmegaConf.is_missing(config, "folder"):
        raise ConfigErrors([Problem("folder", "no sweep's folder is given", "write the folder after the command")])
    from loraplus_hydra.report.terminal import show
    from loraplus_hydra.report.watch import watch
    from loraplus_hydra.report.write import write_report

    folder = expanded(config.folder)
    found_at(folder, "folder")
    if config.watch:
        show(watch(folder))
        return
    with interrupts.notice("the report stops after the current figure, and only results.csv is new"):
        show(write_report(folder))


COMMAND = Command(
    "report",
    "write a sweep's table, page and figures again",
    main,
    usage="DIR [watch=true]",
    config="report",
    positional="folder",
)
