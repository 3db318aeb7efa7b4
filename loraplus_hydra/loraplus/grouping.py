"""Assign each trained tensor to a parameter group: the first rule that matches wins.

Pure Python without torch. `roles.tensor_records` makes the records, `rules.parse_rules` the rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.plan import Group, Plan, PlannedTensor
from loraplus_hydra.loraplus.rules import Rule, TensorRecord, rate_error

GROUP_ORDER = ("groupA", "embedding", "groupB", "groupB_no_decay")
"""The documented groups come first, in PEFT's order; every other group follows, in the order of the rules."""

FROM_THE_BASE_MODEL = frozenset({"saved_module", "bias", "norm", "trainable_tokens"})
"""Roles of tensors that train beside the adapter's own: a ratio between two of these is not LoRA+."""


def assign(
    records: Iterable[TensorRecord],
    rules: Sequence[Rule],
    *,
    lr: float,
    weight_decay: float,
    extra: Sequence[Rule] = (),
) -> Plan:
    """Put every tensor into the group of the first rule that matches it.

    The `extra` rules stand ahead of `rules`. `lr` (eta_A) and `weight_decay` are the optimizer's: the defaults of rules
    that set none. Groups are in the order of `GROUP_ORDER`, their tensors in the order of `records`, and none is empty.

    Raises UserError: a tensor that no rule matches; an extra rule that wins no tensor (unless it has
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
    groups = groups_of(ordered, lr=lr, weight_decay=weight_decay)
    winners = first_match(records, ordered)
    _check_extra_rules(extra, winners, records)
    _check_ratio(ordered, winners, records)
    used = {rule.group for rule in winners}
    return plan_of(records, winners, [group for group in groups if group.name in used])


def first_match(records: Sequence[TensorRecord], rules: Sequence[Rule]) -> list[Rule]:
    """Return the first rule that matches each record, in one linear walk.

    Raises UserError for records that no rule matches.
    """
    candidates: dict[tuple[object, ...], list[Rule]] = {}
    winners: list[Rule] = []
    unmatched: list[str] = []
    for record in records:
        # Even a large model has few kinds of tensors. Rules are filtered once a kind, names are matched once a tensor.
        kind = (record.role, record.owner, len(record.shape), record.owner_classes)
        rules_for_kind = candidates.get(kind)
        if rules_for_kind is None:
            rules_for_kind = candidates[kind] = [rule for rule in rules if rule.matches_kind(record)]
        winner = next((rule for rule in rules_for_kind if rule.matches_name(record.name)), None)
        if winner is not None:
            winners.append(winner)
        else:
            unmatched.append(f"{record.name} (role {record.role}, owner {record.owner}, {record.ndim}-D)")
    if unmatched:
        raise UserError(
            f"no rule matches {len(unmatched)} trained tensor{'s'[: len(unmatched) > 1]}: {_some(unmatched)}. "
            "Add a rule that does, or end loraplus.rules with one without conditions: `rest: {}` takes whatever is left"
        )
    return winners


def check_rate(value: Any, what: str, *, zero: bool = False) -> float:
    """Return `value` as a float if it is finite and above 0 (with `zero`, also 0).

    Raises UserError otherwise.
    """
    if error := rate_error(value, zero=zero):
        raise UserError(f"{what} {error}")
    return float(value)


def groups_of(rules: Sequence[Rule], *, lr: float, weight_decay: float) -> list[Group]:
    """Return the groups that the rules name, still empty, in their final order.

    Raises UserError for two rules of one group that disagree.
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
                f"rules '{first_rule[rule.group]}' and '{rule.name}' share group '{rule.group}' but disagree: "
                f"{_spell(found[rule.group])} against {_spell(group)}. Give one of them its own (`group:`)"
            )
    documented = [name for name in GROUP_ORDER if name in found]
    return [found[name] for name in [*documented, *(name for name in found if name not in GROUP_ORDER)]]


def plan_of(records: Sequence[TensorRecord], winners: Sequence[Rule], groups: Sequence[Group]) -> Plan:
    """Return the plan of the `groups`, each filled with the records that its rules won."""
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
    """Raise UserError for an extra rule that wins no tensor."""
    used = {id(rule) for rule in winners}
    for rule in extra:
        if id(rule) in used or rule.allow_unmatched:
            continue
        why = "no trained tensor matches it"
        if any(rule.matches(record) for record in records):
            why = "every tensor that it matches is taken by an extra rule ahead of it"
        examples = _some([record.name for record in records])
        raise UserError(
            f"loraplus.extra_rules.{rule.name} ({rule.conditions()}) does nothing: {why}. Trained are {examples}. "
            "Mend or remove the rule, or say `allow_unmatched: true` in it"
        )


def _check_ratio(rules: Sequence[Rule], winners: Sequence[Rule], records: Sequence[TensorRecord]) -> None:
    """Raise UserError for a ratio that all tensors of the adapter get, or none of them."""
    meant = [rule.ratio for rule in rules if rule.ratio != 1]
    ratios = {rule.ratio for record, rule in zip(records, winners, strict=True) if _belongs_to_the_pair(record)}
    if not meant or len(ratios) > 1:
        return
    if not ratios:
        why = "no tensor of a LoRA-like adapter is trained"
    elif ratios == {1}:
        why = "no tensor of the adapter gets it"
    else:
        why = "every tensor of the adapter gets it, so it only raises the rate of them all"
    roles = sorted({record.role for record in records})
    raise UserError(
        f"the LoRA+ ratio {meant[0]:g} does nothing here: {why} (trained roles: {', '.join(roles)}). "
        "Use loraplus=none for one rate, loraplus=roles for adapters that `default` doesn't split (VeRA), "
        "a LoRA adapter on more than embeddings, or ratio 1"
    )


def _belongs_to_the_pair(record: TensorRecord) -> bool:
    if record.adapter is None or record.role in FROM_THE_BASE_MODEL:
        return False
    # Matrices of an unknown PEFT method may be a pair that a rule separates; its vectors (DeLoRA's lambda) never are.
    return record.role != "other" or record.ndim > 1


def _spell(group: Group) -> str:
    others = (f"{key} {value}" for key, value in group.settings.items())
    return ", ".join([f"lr {group.lr:g}", f"weight_decay {group.weight_decay:g}", *others])


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
