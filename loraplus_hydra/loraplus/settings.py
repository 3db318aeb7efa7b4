"""Settings of LoRA+ training: optimizer class, rules and schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.factor_pairs import freeze_untrained, trains_a
from loraplus_hydra.loraplus.grouping import assign
from loraplus_hydra.loraplus.optimizer_check import takes
from loraplus_hydra.loraplus.plan import Plan
from loraplus_hydra.loraplus.presets import preset_rules
from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.loraplus.rules import Rule, Rules, as_rules
from loraplus_hydra.loraplus.schedule import named_schedule


@dataclass(frozen=True, kw_only=True)
class LoraPlus:
    """Settings for a Trainer's optimizer and schedule: `LoraPlus(lr=5e-5, ratio=8)`.

    `lr` is eta_A. The rules are `rules` if given, otherwise those of `preset`. `ratio` (eta_B / eta_A) overrides the
    preset's own ratio. `extra_rules` come before the other rules (see `grouping.assign`). Rules are a list of `Rule`s,
    or a mapping as in the YAML files.

    `schedule` is a name, or a callable that `schedule.build_schedule` accepts. With None, the Trainer's arguments
    `lr_scheduler_type` and `warmup_steps` decide the schedule. Rate and weight decay are never taken from the Trainer's
    arguments.

    Raises UserError (a ValueError) for a preset or schedule that doesn't exist, an invalid rule, a ratio together with
    `rules`, or a rate or weight decay in `optimizer_arguments`, where no group would have it.
    """

    lr: float
    ratio: float | None = None
    preset: str = "default"
    schedule: str | Callable[..., Any] | None = None
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
    weight_decay: float = 0.0
    rules: Rules | None = None
    extra_rules: Rules = ()
    optimizer_arguments: Mapping[str, Any] = field(default_factory=dict)
    schedule_arguments: Mapping[str, Any] = field(default_factory=dict)
    # Not in `rules`, so that `dataclasses.replace` with another preset, ratio or rate makes other rules
    _rules: list[Rule] = field(init=False, repr=False, compare=False)
    _extra_rules: list[Rule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, allowed in (("weight_decay", None), ("lr", self.lr)):
            if (value := self.optimizer_arguments.get(key, allowed)) != allowed:
                raise UserError(
                    f"optimizer_arguments has {key}={value!r}, which no group would have: set LoraPlus({key}={value!r})"
                )
        if self.rules is not None and self.ratio is not None:
            raise UserError("`ratio` is only for a preset; with your own `rules`, set the ratio of each rule")
        values = {} if self.ratio is None else {"ratio": self.ratio}
        own = preset_rules(self.preset, lr=self.lr, **values) if self.rules is None else as_rules(self.rules)
        object.__setattr__(self, "_rules", own)
        object.__setattr__(self, "_extra_rules", as_rules(self.extra_rules, "loraplus.extra_rules"))
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", named_schedule(self.schedule))

    def constructor_arguments(self) -> dict[str, Any]:
        """Return the optimizer class's arguments, with `lr`: a schedule's absolute rates refer to it."""
        rate = {"lr": self.lr} if takes(self.optimizer_class, "lr") else {}
        return {**rate, **self.optimizer_arguments}

    def plan(self, model: torch.nn.Module) -> Plan:
        """Return the plan: each trained tensor of `model` with its group.

        Freezes lora_A first if the optimizer's class doesn't train it. Raises UserError for an adapter that the class
        can't train, and for the same reasons as `grouping.assign`.
        """
        freeze_untrained(self.optimizer_class, model)
        return assign(
            tensor_records(model),
            self._rules,
            extra=self._extra_rules,
            lr=self.lr,
            weight_decay=self.weight_decay,
            # Without lora_A, all of the adapter may have the ratio
            check_ratio=trains_a(self.optimizer_class),
        )
