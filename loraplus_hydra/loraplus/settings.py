"""Settings of LoRA+ training: optimizer class, rules and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loraplus_hydra.loraplus.grouping import Rule


@dataclass(frozen=True)
class LoraPlus:
    """What the Trainer makes its optimizer and schedule from.

    `lr` is eta_A; `rules` and `extra_rules` decide each tensor's rate (see `grouping.assign`). `schedule` is a callable
    as `schedule.build_schedule` takes it.
    """

    optimizer_class: type[torch.optim.Optimizer]
    lr: float
    rules: Sequence[Rule]
    schedule: Any
    extra_rules: Sequence[Rule] = ()
    weight_decay: float = 0.0
    optimizer_arguments: Mapping[str, Any] = field(default_factory=dict)
    schedule_arguments: Mapping[str, Any] = field(default_factory=dict)
