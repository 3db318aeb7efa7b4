"""A config without errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig

if TYPE_CHECKING:
    from peft import PeftModel

    from loraplus_hydra.io.checkpoints import Checkpoint
    from loraplus_hydra.loraplus.plan import Plan


@dataclass(frozen=True)
class Checked:
    """A config without errors, and the parts of the check that a command can use again."""

    config: DictConfig
    model: PeftModel  # the model with its adapter, on the meta device
    plan: Plan  # the plan of the model's parameter groups
    checkpoint: Checkpoint | None = None  # the checkpoint that the config names
    notes: tuple[str, ...] = ()  # notes about the rows, for the user
