"""Settings of LoRA+ training: optimizer class, rules and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loraplus_hydra.loraplus.grouping import assign
from loraplus_hydra.loraplus.plan import Plan
from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.loraplus.rules import Rule


@dataclass(frozen=True)
class LoraPlus:
    """Settings from which a Trainer makes its optimizer and schedule.

    `lr` is eta_A; `rules` and `extra_rules` decide each tensor's rate (see `grouping.assign`). `schedule` is a callable
    that `schedule.build_schedule` accepts.
    """

    optimizer_class: type[torch.optim.Optimizer]
    lr: float
    rules: Sequence[Rule]
    schedule: Any
    extra_rules: Sequence[Rule] = ()
    weight_decay: float = 0.0
    optimizer_arguments: Mapping[str, Any] = field(default_factory=dict)
    schedule_arguments: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, model: torch.nn.Module) -> Plan:
        """Assign each trained tensor of `model` to its group. Raises UserError as `grouping.assign` does."""
        return assign(
            tensor_records(model), self.rules, extra=self.extra_rules, lr=self.lr, weight_decay=self.weight_decay
        )
