"""Which trained tensor gets which rate, and why: the rows of the table that `inspect` and every run show.

The bits of optimizer state, and their bytes, are measured and not assumed: the run's own optimizer class takes a step
on stand-ins of the trained tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplus_hydra.loraplus.grouping import Group, Rule, TensorRecord, assign, first_match

if TYPE_CHECKING:
    import torch

    from loraplus_hydra.loraplus.settings import LoraPlus

LARGEST_STAND_IN = 2**21  # numbers; a larger tensor is stood in for by its first rows


@dataclass(frozen=True)
class Placed:
    """A trained tensor, the rule that decided about it, and what it trains with."""

    record: TensorRecord
    rule: Rule
    group: Group
    state_bits: int | None = None  # of the widest per-number state; 0 = the optimizer keeps none; None = unknown
    state_bytes: int | None = None

    def why(self) -> str:
        """The reason in words: what the rule asked for, and what of the tensor met it."""
        conditions = self.rule.conditions()
        if conditions == "everything":
            conditions = "all that no rule ahead of it takes"
        return f"rule {self.rule.name}: {conditions}"


@dataclass(frozen=True)
class Row:
    """Tensors that share everything a person wants to know of them."""

    role: str
    rule: str
    group: str
    lr: float
    weight_decay: float
    state_bits: int | None
    tensors: int
    numbers: int


def place(records: Sequence[TensorRecord], loraplus: LoraPlus) -> list[Placed]:
    """Every record with its rule and group, in the groups' order. Raises UserError as `grouping.assign` does."""
    rules = [*loraplus.extra_rules, *loraplus.rules]
    groups = assign(
        records, loraplus.rules, extra=loraplus.extra_rules, lr=loraplus.lr, weight_decay=loraplus.weight_decay
    )
    state = _state_by_kind(groups, loraplus)
    return [
        Placed(record, rule, group, *state.get(_kind(record, group), (None, None)))
        for group in groups
        for record, rule in zip(group.records, first_match(group.records, rules), strict=True)
    ]


def rows(placed: Sequence[Placed]) -> list[Row]:
    """One row for each distinct (role, rule, group, lr, weight decay, state bits), in the order of first appearance."""
    collected: dict[tuple[Any, ...], list[Placed]] = {}
    for one in placed:
        group = one.group
        key = (one.record.role, one.rule.name, group.name, group.lr, group.weight_decay, one.state_bits)
        collected.setdefault(key, []).append(one)
    found = []
    for members in collected.values():
        first, numbers = members[0], sum(member.record.numel for member in members)
        group = first.group
        rates = (group.lr, group.weight_decay, first.state_bits)
        found.append(Row(first.record.role, first.rule.name, group.name, *rates, len(members), numbers))
    return found


def largest_ratio(placed: Sequence[Placed]) -> float:
    """The LoRA+ ratio in force: the one furthest from 1 among the rules that matched."""
    ratios = {one.rule.ratio for one in placed}
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio)) if ratios else 1.0


def _kind(record: TensorRecord, group: Group) -> tuple[Any, ...]:
    return group.name, record.shape, record.trained_embedding


def _state_by_kind(groups: Sequence[Group], loraplus: LoraPlus) -> dict[tuple[Any, ...], tuple[int | None, int | None]]:
    """Bits and bytes of the optimizer's state for each kind of tensor, after one step on a stand-in for each."""
    import torch

    from loraplus_hydra.loraplus.optimizer import build_optimizer

    stand_ins: dict[str, torch.nn.Parameter] = {}
    kinds: dict[str, tuple[tuple[Any, ...], TensorRecord]] = {}
    reduced: list[Group] = []
    for group in groups:
        of_group = {_kind(record, group): record for record in group.records}
        for kind, record in of_group.items():
            stand_in = torch.nn.Parameter(torch.zeros(_bounded(record.shape)))
            stand_in.grad = torch.ones_like(stand_in)
            stand_ins[record.name], kinds[record.name] = stand_in, (kind, record)
        members = tuple(of_group.values())
        reduced.append(Group(group.name, group.lr, group.weight_decay, group.settings, members, group.rules))
    optimizer = build_optimizer(
        loraplus.optimizer_class, reduced, stand_ins.items(), dict(loraplus.optimizer_arguments)
    )
    try:
        optimizer.step()
    except (RuntimeError, ValueError, NotImplementedError):  # a class that steps on a GPU alone
        return {}
    found: dict[tuple[Any, ...], tuple[int | None, int | None]] = {}
    for name, stand_in in stand_ins.items():
        kind, record = kinds[name]
        bits, size = _measure(optimizer.state[stand_in], stand_in.numel())
        found[kind] = (bits, round(size * record.numel / max(1, stand_in.numel())))
    return found


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with fewer rows where it has too many numbers; never below what bitsandbytes keeps in 8 bits."""
    numbers = 1
    for size in shape:
        numbers *= size
    if numbers <= LARGEST_STAND_IN or not shape:
        return shape
    rows_kept = max(1, shape[0] * LARGEST_STAND_IN // numbers)
    return (rows_kept, *shape[1:])


def _measure(state: dict[str, Any], numbers: int) -> tuple[int, int]:
    """Bits of the widest state that has a value for each number, and the bytes of all of a tensor's own state."""
    import torch

    bits = size = 0
    for name, value in state.items():
        # bitsandbytes' quantisation maps (qmap1, qmap2) are one tensor for all parameters
        if not isinstance(value, torch.Tensor) or name.startswith("qmap"):
            continue
        size += value.numel() * value.element_size()
        if value.numel() >= numbers > 1:
            bits = max(bits, value.element_size() * 8)
    return bits, size
