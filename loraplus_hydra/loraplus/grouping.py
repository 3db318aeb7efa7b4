"""Assign each trained tensor to a parameter group by the first rule that matches.

This module needs no torch. `roles.tensor_records` makes the records, and `rules.parse_rules` makes the rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from loraplus_hydra.errors import UserError, first_of
from loraplus_hydra.loraplus.plan import Group, Plan, PlannedTensor
from loraplus_hydra.loraplus.rules import Rule, TensorRecord, rate_error

GROUP_ORDER = ("groupA", "embedding", "groupB", "groupB_no_decay")
"""PEFT's groups in PEFT's order; they come first. Other groups follow in the order of the rules."""

FROM_THE_BASE_MODEL = frozenset({"saved_module", "bias", "norm", "trainable_tokens"})
"""Roles of trained tensors outside the adapter. Different rates for two of these tensors are not LoRA+."""


def assign(
    records: Iterable[TensorRecord],
    rules: Sequence[Rule],
    *,
    lr: float,
    weight_decay: float,
    extra: Sequence[Rule] = (),
    check_ratio: bool = True,
) -> Plan:
    """Put every tensor into the group of the first rule that matches it.

    The `extra` rules come before `rules`. `lr` (eta_A) and `weight_decay` are the optimizer's values, for rules that
    set none. The plan has the groups in the order of `GROUP_ORDER` and their tensors in the order of `records`. Empty
    groups are omitted.

    Raises UserError if no rule matches a tensor, if an extra rule gets no tensor (unless it has `allow_unmatched`), if
    two rules of one group disagree, or, with `check_ratio`, if a ratio other than 1 makes no difference between two
    trained tensors of the adapter.
    """
    check_rate(lr, "lr")
    check_rate(weight_decay, "weight_decay", zero=True)
    records = list(records)
    if not records:
        raise UserError(
            "the model has no trained tensor, because none requires a gradient; add an adapter, or unfreeze some "
            "tensors"
        )
    ordered = [*extra, *rules]
    groups = groups_of(ordered, lr=lr, weight_decay=weight_decay)
    winners = first_match(records, ordered)
    _check_extra_rules(extra, winners, records)
    if check_ratio:
        _check_ratio(ordered, winners, records)
    used = {rule.group for rule in winners}
    return plan_of(records, winners, [group for group in groups if group.name in used])


def first_match(records: Sequence[TensorRecord], rules: Sequence[Rule]) -> list[Rule]:
    """Return, for each record, the first rule that matches it.

    Takes one pass over the records. Raises UserError if no rule matches a record.
    """
    candidates: dict[tuple[object, ...], list[Rule]] = {}
    winners: list[Rule] = []
    unmatched: list[str] = []
    for record in records:
        # Even a large model has few kinds of tensors. So rules are filtered once per kind, and names are matched once
        # per tensor.
        kind = (record.role, record.owner, len(record.shape), record.owner_classes, record.new_head)
        if kind not in candidates:
            candidates[kind] = [rule for rule in rules if rule.matches_kind(record)]
        winner = next((rule for rule in candidates[kind] if rule.matches_name(record.name)), None)
        if winner is not None:
            winners.append(winner)
        else:
            unmatched.append(f"{record.name} (role {record.role}, owner {record.owner}, {record.ndim}-D)")
    if unmatched:
        raise UserError(
            f"no rule matches {len(unmatched)} trained tensor{'s' if len(unmatched) > 1 else ''}: "
            f"{first_of(unmatched, 3)}. "
            "Add a rule that matches, or end loraplus.rules with a rule without conditions: `rest: {}` matches all "
            "other tensors"
        )
    return winners


def check_rate(value: Any, what: str, *, zero: bool = False) -> float:
    """Return `value` as a float if it is finite and above 0; with `zero`, 0 is also valid.

    Raises UserError otherwise.
    """
    if error := rate_error(value, zero=zero):
        raise UserError(f"{what} {error}")
    return float(value)


def groups_of(rules: Sequence[Rule], *, lr: float, weight_decay: float) -> list[Group]:
    """Return the rules' groups, without tensors, in their final order.

    Raises UserError if two rules of one group have different settings.
    """
    found: dict[str, Group] = {}
    first_rule: dict[str, str] = {}
    for rule in rules:
        decay = weight_decay if rule.weight_decay is None else rule.weight_decay
        group = Group(rule.group, rule.rate(lr), float(decay), dict(rule.settings))
        if rule.group not in found:
            found[rule.group], first_rule[rule.group] = group, rule.name
        elif found[rule.group] != group:
            raise UserError(
                f"rules '{first_rule[rule.group]}' and '{rule.name}' share group '{rule.group}' but have different "
                f"settings: {_spell(found[rule.group])} and {_spell(group)}. Give one of the rules another group "
                "(`group:`)"
            )
    documented = [name for name in GROUP_ORDER if name in found]
    return [found[name] for name in [*documented, *(name for name in found if name not in GROUP_ORDER)]]


def plan_of(records: Sequence[TensorRecord], winners: Sequence[Rule], groups: Sequence[Group]) -> Plan:
    """Return the plan: each group gets the records for which one of its rules came first."""
    members: dict[str, list[tuple[TensorRecord, Rule]]] = {group.name: [] for group in groups}
    for record, rule in zip(records, winners, strict=True):
        members[rule.group].append((record, rule))
    filled = [
        replace(
            group,
            records=tuple(record for record, _ in members[group.name]),
            rules=tuple(dict.fromkeys(rule.name for _, rule in members[group.name])),
        )
        for group in groups
    ]
    tensors = (PlannedTensor(record, rule, group) for group in filled for record, rule in members[group.name])
    return Plan(tuple(filled), tuple(tensors))


def _check_extra_rules(extra: Sequence[Rule], winners: Sequence[Rule], records: Sequence[TensorRecord]) -> None:
    """Raise UserError for an extra rule that gets no tensor."""
    used = {id(rule) for rule in winners}
    for rule in extra:
        if id(rule) in used or rule.allow_unmatched:
            continue
        why = "no trained tensor matches it"
        if any(rule.matches(record) for record in records):
            why = "each tensor that it matches is also matched by an earlier extra rule"
        examples = first_of([record.name for record in records], 3)
        raise UserError(
            f"loraplus.extra_rules.{rule.name} ({rule.conditions()}) has no effect: {why}. Trained tensors are "
            f"{examples}. Correct or remove the rule, or add `allow_unmatched: true` to it"
        )


def _check_ratio(rules: Sequence[Rule], winners: Sequence[Rule], records: Sequence[TensorRecord]) -> None:
    """Raise UserError for a ratio that either all tensors of the adapter get, or none."""
    meant = [rule.ratio for rule in rules if rule.ratio != 1]
    ratios = {rule.ratio for record, rule in zip(records, winners, strict=True) if _belongs_to_the_pair(record)}
    if not meant or len(ratios) > 1:
        return
    if not ratios:
        why = "no tensor of a LoRA-like adapter is trained"
    elif ratios == {1}:
        why = "no tensor of the adapter gets the ratio"
    else:
        why = "every tensor of the adapter gets the ratio, so it only changes the rate of all of them"
    roles = sorted({record.role for record in records})
    raise UserError(
        f"the LoRA+ ratio {meant[0]:g} has no effect here: {why} (trained roles: {', '.join(roles)}). "
        "Use loraplus=none for one rate, loraplus=roles for an adapter whose factors `default` doesn't separate "
        "(VeRA), a LoRA adapter on more than embeddings, or ratio 1"
    )


def _belongs_to_the_pair(record: TensorRecord) -> bool:
    if record.adapter is None or record.role in FROM_THE_BASE_MODEL:
        return False
    # Two matrices of an unknown PEFT method may be a pair of factors with different rates. Its vectors (DeLoRA's
    # lambda) are not.
    return record.role != "other" or record.ndim > 1


def _spell(group: Group) -> str:
    others = (f"{key} {value}" for key, value in group.settings.items())
    return ", ".join([f"lr {group.lr:g}", f"weight_decay {group.weight_decay:g}", *others])
