"""Rules that decide a tensor's rate, and the records of tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from loraplus_hydra.config.types import fits
from loraplus_hydra.errors import ConfigErrors, Problem, nearest, refuse
from loraplus_hydra.loraplus.peft_layers import ADAPTER_ROLES

ROLES: tuple[str, ...] = (*ADAPTER_ROLES, "saved_module", "bias", "norm", "other")
"""Every role that a trained tensor can have."""

CONDITIONS = ("role", "pattern", "owner", "ndim", "new_head")
_KINDS = {"ndim": "a whole number, 0 or more", "new_head": "true or false"}  # of a condition's values; others: text
RATES = ("lr", "lr_mult", "ratio", "weight_decay")
RULE_KEYS = (*CONDITIONS, *RATES, "group", "allow_unmatched")
RESERVED = frozenset({"params", "name", "param_names", "initial_lr"})
"""Keys of a torch parameter group that a rule can't set."""


class TensorRecord(NamedTuple):
    """The properties of a trained tensor that a rule can match.

    `owner` is the class of the tensor's layer, or of the adapted layer for an adapter's tensor. `owner_classes` has
    this class and its base classes, by name and by full path. `shape` is the shape before the model is sharded.
    `trained_embedding` is True for tensors for which 8-bit optimizers keep 32-bit state. `starts_at_zero` is None if
    the start is unknown. `new_head` is True for a tensor of a classification head that is trained from a random start.
    """

    name: str
    role: str
    owner: str
    shape: tuple[int, ...]
    adapter: str | None = None
    dtype: str = "float32"
    trained_embedding: bool = False
    starts_at_zero: bool | None = None
    owner_classes: tuple[str, ...] = ()
    new_head: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Rule:
    """Conditions on tensors, and the rate and settings of the tensors that match.

    A tensor matches if all conditions are true. An empty condition is always true. `role`, `owner`, `ndim` and
    `new_head` are lists; the tensor's own value must be in the list. `owner` may also be a base class of the tensor's
    layer, by name or full path. `pattern` is a list of regular expressions; one of them must be found in the tensor's
    name. The rate is `lr`, or the optimizer's lr x `lr_mult` x `ratio`, where `ratio` is LoRA+'s eta_B / eta_A. If
    `weight_decay` is None, the optimizer's weight decay is used. `settings` are the optimizer's other arguments per
    group (`betas`, ...).

    A single value of a condition becomes a list. Raises ConfigErrors for the same reasons as `parse_rules`.
    """

    name: str
    role: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()
    owner: tuple[str, ...] = ()
    ndim: tuple[int, ...] = ()
    new_head: tuple[bool, ...] = ()
    group: str = ""
    lr: float | None = None
    lr_mult: float = 1.0
    ratio: float = 1.0
    weight_decay: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    allow_unmatched: bool = False
    _patterns: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in CONDITIONS:
            value = getattr(self, key)
            # Text would otherwise be matched letter by letter, and `new_head=False` would be no condition
            object.__setattr__(self, key, () if value is None else tuple(_listed(value)))
        object.__setattr__(self, "group", self.group or self.name)
        refuse(_problems(self._keys(), f"Rule({self.name!r})"))
        object.__setattr__(self, "_patterns", tuple(re.compile(pattern) for pattern in self.pattern))

    def _keys(self) -> dict[str, Any]:
        """Return the keys that a mapping would have for this rule."""
        default = {one.name: one.default for one in fields(self)}
        keys = {key: getattr(self, key) for key in RULE_KEYS}
        return {**self.settings, **{key: value for key, value in keys.items() if value != default[key]}}

    def rate(self, base_lr: float) -> float:
        """Return the learning rate of this rule's tensors; `base_lr` is the optimizer's rate."""
        return float(self.lr) if self.lr is not None else base_lr * self.lr_mult * self.ratio

    def matches(self, record: TensorRecord) -> bool:
        """Return True if this tensor meets all conditions."""
        return self.matches_kind(record) and self.matches_name(record.name)

    def matches_kind(self, record: TensorRecord) -> bool:
        """Return True if this tensor meets all conditions except the one on its name."""
        if self.role and record.role not in self.role:
            return False
        if self.ndim and record.ndim not in self.ndim:
            return False
        if self.new_head and record.new_head not in self.new_head:
            return False
        return not self.owner or record.owner in self.owner or any(name in self.owner for name in record.owner_classes)

    def matches_name(self, name: str) -> bool:
        """Return True if one of the patterns is found in the tensor's name."""
        return not self._patterns or any(pattern.search(name) for pattern in self._patterns)

    def conditions(self) -> str:
        """Return the conditions as text for a message."""
        found = [f"{key}: {', '.join(map(str, getattr(self, key)))}" for key in CONDITIONS if getattr(self, key)]
        return "; ".join(found) or "everything"


Rules = Sequence[Rule] | Mapping[str, Any]
"""A list of `Rule`s, or a mapping as in the YAML files."""


def as_rules(rules: Rules, where: str = "loraplus.rules") -> list[Rule]:
    """Return `rules` as a list of `Rule`s. Raises ConfigErrors for the same reasons as `parse_rules`."""
    return parse_rules(rules, where) if isinstance(rules, Mapping) else list(rules)


def parse_rules(rules: Mapping[str, Any], where: str = "loraplus.rules") -> list[Rule]:
    """Return the rules of a mapping `name -> {condition or setting: value}`, in the mapping's order.

    A rule that is null is omitted. Raises ConfigErrors with all errors; each has its key, which begins with `where`.
    """
    if not isinstance(rules, Mapping):
        fix = "for instance {head: {pattern: score, lr: 1e-3}}"
        raise ConfigErrors([Problem(where, f"must map names to rules, got {rules!r}", fix)])
    problems: list[Problem] = []
    parsed = []
    for name, keys in rules.items():
        key = f"{where}.{name}"
        if keys is None:
            continue
        if not isinstance(keys, Mapping):
            fix = "for instance {pattern: score, lr: 1e-3}"
            problems.append(Problem(key, f"a rule is a mapping, got {keys!r}", fix))
            continue
        # A null removes a condition or a setting: `loraplus.rules.groupB.weight_decay=null` on the command line. A null
        # rate is an error, because it would silently switch LoRA+ off.
        present = {
            str(item): value for item, value in keys.items() if value is not None or item in ("lr", "lr_mult", "ratio")
        }
        found = _problems(present, key)
        problems += found
        if not found:
            parsed.append(_rule(str(name), present))
    refuse(problems)
    return parsed


def _rule(name: str, keys: Mapping[str, Any]) -> Rule:
    known: dict[str, Any] = {key: tuple(_listed(keys[key])) for key in CONDITIONS if key in keys}
    known |= {key: float(keys[key]) for key in RATES if key in keys}
    known |= {key: keys[key] for key in ("group", "allow_unmatched") if key in keys}
    settings = {key: _plain(value) for key, value in keys.items() if key not in RULE_KEYS}
    return Rule(name=name, settings=settings, **known)


def _problems(keys: Mapping[str, Any], where: str) -> list[Problem]:
    problems = [problem for key in CONDITIONS if key in keys for problem in _condition_problems(key, keys[key], where)]
    problems += [
        Problem(f"{where}.{key}", error)
        for key in RATES
        if key in keys and (error := rate_error(keys[key], zero=key != "ratio"))
    ]
    if "lr" in keys:
        problems += [
            Problem(
                f"{where}.{key}", "can't be combined with `lr`, which is the whole rate", f"keep either `lr` or `{key}`"
            )
            for key in ("lr_mult", "ratio")
            if key in keys
        ]
    if "group" in keys and not (isinstance(keys["group"], str) and keys["group"]):
        problems.append(Problem(f"{where}.group", f"must be a name, got {keys['group']!r}"))
    if "allow_unmatched" in keys and not isinstance(keys["allow_unmatched"], bool):
        problems.append(Problem(f"{where}.allow_unmatched", f"must be true or false, got {keys['allow_unmatched']!r}"))
    problems += [
        Problem(f"{where}.{key}", "is set by the optimizer itself, not by a rule", f"use one of {', '.join(RULE_KEYS)}")
        for key in keys
        if key in RESERVED
    ]
    return problems


def _condition_problems(key: str, value: Any, where: str) -> list[Problem]:
    values = _listed(value)
    key_path = f"{where}.{key}"
    if not values:
        return [Problem(key_path, "an empty list matches nothing", f"name at least one {key}, or leave `{key}` out")]
    kind = _KINDS.get(key, "text")
    if wrong := [item for item in values if not _is_valid(key, item)]:
        return [Problem(key_path, f"must be {kind}, or a list of such values, got {wrong[0]!r}")]
    if key == "role":
        return [
            Problem(key_path, f"there is no role '{item}'{nearest(item, ROLES)}", f"the roles are {', '.join(ROLES)}")
            for item in values
            if item not in ROLES
        ]
    return [problem for item in values for problem in _pattern_problems(item, key_path)] if key == "pattern" else []


def _is_valid(key: str, value: Any) -> bool:
    """Return True if a condition's value has the right type."""
    if key == "ndim":
        return fits(value, int) and value >= 0
    return fits(value, bool if key == "new_head" else str)


def _pattern_problems(pattern: str, key_path: str) -> list[Problem]:
    try:
        re.compile(pattern)
    except re.error as error:
        fix = r"write a dot as \. and a bracket as \["
        return [Problem(key_path, f"{pattern!r} is not a regular expression ({error})", fix)]
    return []


def rate_error(value: Any, *, zero: bool) -> str:
    """Return the error in a rate. It is valid if it is finite and above 0 (with `zero`, also 0)."""
    if not fits(value, float):
        return f"must be a number, got {value!r}"
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        return f"must be finite and {'not below' if zero else 'above'} 0, got {value!r}"
    return ""


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _plain(value: Any) -> Any:
    """Return lists from YAML as tuples, because optimizers expect tuples (`betas`)."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(map(_plain, value)) if is_list else value
