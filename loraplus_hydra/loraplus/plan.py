"""The plan of training: every trained tensor with its rule and its parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loraplus_hydra.loraplus.rules import Rule, TensorRecord


@dataclass(frozen=True)
class Group:
    """A parameter group: tensors that share rate, weight decay and every other optimizer setting."""

    name: str
    lr: float
    weight_decay: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[TensorRecord, ...] = ()
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class StateSize:
    """Size of an optimizer's state for one tensor."""

    bits: int  # bits of the widest state with a value for each element; 0 = the optimizer has no such state
    bytes: int


class PlannedTensor(NamedTuple):
    """A trained tensor, the rule that decided its rate, and its group."""

    record: TensorRecord
    rule: Rule
    group: Group
    state: StateSize | None = None  # None before `memory.measure_state`, or if the state can't be measured

    def reason(self) -> str:
        """Return the rule and its conditions as text."""
        conditions = self.rule.conditions()
        if conditions == "everything":
            conditions = "every tensor that no earlier rule matches"
        return f"rule {self.rule.name}: {conditions}"

    def as_dict(self) -> dict[str, Any]:
        """Return the tensor's entry in param_groups.json. The keys are an interface."""
        return {
            "name": self.record.name,  # the tensor's name in the model
            "role": self.record.role,  # lora_A, lora_B, bias, ...
            "rule": self.rule.name,  # the first rule of the preset that matches
            "group": self.group.name,  # its parameter group in the optimizer
            "shape": list(self.record.shape),  # the tensor's shape
            "lr": self.group.lr,  # the group's rate, before the schedule
            "weight_decay": self.group.weight_decay,  # the group's weight decay
        }


@dataclass(frozen=True)
class Plan:
    """The rule and group of every trained tensor.

    `grouping.assign` makes it once for a run. The optimizer, the table of rates, param_groups.json and `inspect` use
    it. The Trainer makes a new plan only if the trained tensors have changed since.
    """

    groups: tuple[Group, ...]
    tensors: tuple[PlannedTensor, ...]  # sorted by group, then in the order of the model's parameters

    @property
    def records(self) -> list[TensorRecord]:
        """The records of the trained tensors, sorted by group."""
        return [tensor.record for tensor in self.tensors]

    @property
    def largest_ratio(self) -> float:
        """The LoRA+ ratio of the run: of the ratios in rules that matched, the one furthest from 1."""
        ratios = {tensor.rule.ratio for tensor in self.tensors}
        return max(ratios, key=lambda ratio: max(ratio, 1 / ratio)) if ratios else 1.0


@dataclass(frozen=True)
class Row:
    """A row of the table of rates: tensors with the same role, rule, group and optimizer state."""

    role: str
    rule: str
    group: str
    lr: float
    weight_decay: float
    state_bits: int | None
    tensors: int
    numbers: int


def table_rows(plan: Plan) -> list[Row]:
    """Return one row for each combination of role, rule, group and state, in order of appearance."""
    collected: dict[tuple[str, str, str, int | None], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        bits = None if tensor.state is None else tensor.state.bits
        collected.setdefault((tensor.record.role, tensor.rule.name, tensor.group.name, bits), []).append(tensor)
    return [
        Row(
            role=role,
            rule=rule,
            group=group,
            lr=members[0].group.lr,
            weight_decay=members[0].group.weight_decay,
            state_bits=bits,
            tensors=len(members),
            numbers=sum(member.record.numel for member in members),
        )
        for (role, rule, group, bits), members in collected.items()
    ]
