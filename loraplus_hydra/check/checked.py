"""A config without errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from loraplus_hydra.io.checkpoints import Checkpoint
from loraplus_hydra.loraplus.plan import Plan

if TYPE_CHECKING:
    from peft import PeftModel  # loads torch


@dataclass(frozen=True)
class Checked:
    """A config without errors, and the parts of its dry run that a command can use again."""

    config: DictConfig
    model: PeftModel  # with its adapter, on the meta device
    plan: Plan  # of the model's parameter groups
    checkpoint: Checkpoint | None = None  # the one that the config names
    notes: tuple[str, ...] = ()  # on the rows, for the user
