"""Trained tensors and rules in, parameter groups out: the heart of LoRA+, pure Python without torch.

A tensor arrives as a `TensorRecord` (roles.py makes them). An ordered list of `Rule`s says at which rate a tensor
trains; the first rule that matches wins. `assign` turns both into `Group`s, one for each group name, in a fixed
order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.rules import ROLES, Rule, TensorRecord, parse_rules

__all__ = ["GROUP_ORDER", "ROLES", "Group", "Rule", "TensorRecord", "assign", "first_match", "parse_rules"]

GROUP_ORDER = ("groupA", "embedding", "groupB", "groupB_no_decay")
"""The documented groups come first, in PEFT's order; every other group follows, in the order of the rules."""

FROM_THE_BASE_MODEL = frozenset({"saved_module", "bias", "norm", "trainable_tokens"})
"""Roles of tensors that train beside the adapter's own: no ratio between these two is LoRA+."""


@dataclass(frozen=True)
class Group:
    """One parameter group: tensors that share rate, weight decay and every other setting of the optimizer."""

    name: str
    lr: float
    weight_decay: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: tuple[TensorRecord, ...] = ()
    rules: tuple[str, ...] = ()


def assign(
    records: Iterable[TensorRecord],
    rules: Sequence[Rule],
    *,
    lr: float,
    weight_decay: float,
    extra: Sequence[Rule] = (),
) -> list[Group]:
    """Put every tensor into the group of the first rule that matches it; the `extra` rules stand ahead of `rules`.

    `lr` (eta_A) and `weight_decay` are the optimizer's: what a rule that names none stands for. Groups come back as
    `GROUP_ORDER` says, their tensors in the order of `records`, never an empty one.

    Raises UserError: a tensor that no rule matches; an extra rule that wins no tensor (unless it says
    `allow_unmatched`); two rules of one group that disagree; a ratio other than 1 that separates no two trained
    tensors of the adapter.
    """
    check_rate(lr, "lr")
    check_rate(weight_decay, "weight_decay", zero=True)
    records = list(records)
    if not records:
        raise UserError(
            "nothing is trained: no tensor of the model requires a gradient; add an adapter, or unfreeze some tensors"
        )
    ordered = [*extra, *rules]
    settings = _settings_by_group(ordered, lr=lr, weight_decay=weight_decay)
    winners = first_match(records, ordered)
    _check_every_extra_rule_matched(extra, winners, records)
    _check_the_ratio_does_something(ordered, winners, records)
    return _collect(records, winners, ordered, settings)


def first_match(records: Sequence[TensorRecord], rules: Sequence[Rule]) -> list[Rule]:
    """The first rule that matches, for each record; one linear walk. UserError for records that no rule matches."""
    candidates: dict[tuple[object, ...], list[Rule]] = {}
    winners: list[Rule] = []
    unmatched: list[str] = []
    for record in records:
        # Tensors that differ in their names only share the rules that their names then decide about: there are few such
        # kinds in a model of any size, which keeps this linear with a small constant.
        kind = (record.role, record.owner, len(record.shape), record.owner_classes)
        rules_for_kind = candidates.get(kind)
        if rules_for_kind is None:
            rules_for_kind = candidates[kind] = [rule for rule in rules if rule.matches_kind(record)]
        for rule in rules_for_kind:
            if rule.matches_name(record.name):
                winners.append(rule)
                break
        else:
            unmatched.append(f"{record.name} (role {record.role}, owner {record.owner}, {record.ndim}-D)")
    if unmatched:
        raise UserError(
            f"no rule matches {len(unmatched)} trained tensor{'s'[: len(unmatched) > 1]}: {_some(unmatched)}. "
            "Add a rule that does, or end loraplus.rules with one without conditions: `rest: {}` takes whatever is left"
        )
    return winners


def check_rate(value: object, what: str, *, zero: bool = False) -> float:
    """`value` as a float if it is finite and above zero (or zero, if `zero` allows it); UserError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{what} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UserError(f"{what} must be finite and {'not below' if zero else 'above'} 0, got {value!r}")
    return float(value)


def _settings_by_group(
    rules: Sequence[Rule], *, lr: float, weight_decay: float
) -> dict[str, tuple[float, float, dict[str, Any]]]:
    """What each group's rules say about it, in the groups' final order; they have to agree."""
    found: dict[str, tuple[float, float, dict[str, Any]]] = {}
    first_rule: dict[str, str] = {}
    for rule in rules:
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        settings = (rule.rate(lr), float(decay), dict(rule.settings))
        if rule.group not in found:
            found[rule.group], first_rule[rule.group] = settings, rule.name
        elif found[rule.group] != settings:
            raise UserError(
                f"rules '{first_rule[rule.group]}' and '{rule.name}' share group '{rule.group}' but disagree: "
                f"{_spell(found[rule.group])} against {_spell(settings)}. Give one of them its own (`group:`)"
            )
    documented = [name for name in GROUP_ORDER if name in found]
    return {name: found[name] for name in [*documented, *(name for name in found if name not in GROUP_ORDER)]}


def _collect(
    records: Sequence[TensorRecord],
    winners: Sequence[Rule],
    rules: Sequence[Rule],
    settings: Mapping[str, tuple[float, float, dict[str, Any]]],
) -> list[Group]:
    members: dict[str, list[TensorRecord]] = {name: [] for name in settings}
    used: set[int] = set()
    for record, rule in zip(records, winners, strict=True):
        members[rule.group].append(record)
        used.add(id(rule))
    return [
        Group(
            name=name,
            lr=lr,
            weight_decay=weight_decay,
            settings=extra_settings,
            records=tuple(members[name]),
            rules=tuple(rule.name for rule in rules if rule.group == name and id(rule) in used),
        )
        for name, (lr, weight_decay, extra_settings) in settings.items()
        if members[name]
    ]


def _check_every_extra_rule_matched(
    extra: Sequence[Rule], winners: Sequence[Rule], records: Sequence[TensorRecord]
) -> None:
    used = {id(rule) for rule in winners}
    for rule in extra:
        if id(rule) in used or rule.allow_unmatched:
            continue
        shadowed = any(rule.matches(record) for record in records)
        why = (
            "every tensor that it matches is taken by an extra rule ahead of it"
            if shadowed
            else "no trained tensor matches it"
        )
        examples = _some([record.name for record in records])
        raise UserError(
            f"loraplus.extra_rules.{rule.name} ({rule.conditions()}) does nothing: {why}. Trained are {examples}. "
            "Mend or remove the rule, or say `allow_unmatched: true` in it"
        )


def _check_the_ratio_does_something(
    rules: Sequence[Rule], winners: Sequence[Rule], records: Sequence[TensorRecord]
) -> None:
    """LoRA+ is a ratio between two tensors of one adapter; a ratio that all of them get, or none, is plain training."""
    meant = [rule for rule in rules if rule.ratio != 1]
    if not meant:
        return
    adapter = [
        (record, rule.ratio) for record, rule in zip(records, winners, strict=True) if _belongs_to_the_pair(record)
    ]
    if len({ratio for _, ratio in adapter}) > 1:
        return
    ratio = f"{meant[0].ratio:g}"
    roles = sorted({record.role for record in records})
    if not adapter:
        why = "no tensor of a LoRA-like adapter is trained"
    elif adapter[0][1] == 1:
        why = "no tensor of the adapter gets it"
    else:
        why = "every tensor of the adapter gets it, so it only raises the rate of them all"
    raise UserError(
        f"the LoRA+ ratio {ratio} does nothing here: {why} (trained roles: {', '.join(roles)}). "
        "Use loraplus=none for one rate, loraplus=roles for adapters that `default` doesn't split (VeRA), "
        "a LoRA adapter on more than embeddings, or ratio 1"
    )


def _belongs_to_the_pair(record: TensorRecord) -> bool:
    if record.adapter is None or record.role in FROM_THE_BASE_MODEL:
        return False
    # Vectors of methods that LoRA+ knows nothing about (DeLoRA's lambda) are no partner for a ratio; matrices a rule
    # may pair.
    return record.role != "other" or record.ndim > 1


def _spell(settings: tuple[float, float, dict[str, Any]]) -> str:
    lr, weight_decay, others = settings
    return ", ".join(
        [f"lr {lr:g}", f"weight_decay {weight_decay:g}", *(f"{key} {value}" for key, value in others.items())]
    )


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
