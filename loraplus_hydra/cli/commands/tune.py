"""`tune`: search for rate and ratio at the cost of a few runs.

The sweeper of `hparams_search=tune` does the work.
"""

from __future__ import annotations

from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.cli.commands.train import main

COMMAND = Command("tune", "find the rate and the ratio, at the cost of about five runs", main, search="tune")
