"""Checks of keys: missing values, broken interpolations, and unused keys."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from loraplus_hydra.config.schema import AUTO_LR, CLOSED_GROUPS, GROUPS, RunConfig
from loraplus_hydra.config.synonyms import meant_overrides
from loraplus_hydra.errors import Problem, first_line, nearest

CLOSED: dict[str, type] = {"": RunConfig, **{group: GROUPS[group] for group in CLOSED_GROUPS}}
NOT_SET = "is not set"


def read_config(config: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """Return the config as plain containers, and a Problem for each unreadable value.

    Unreadable values are removed from the containers.
    """
    problems: list[Problem] = []
    plain = _read(config, "", problems)
    assert isinstance(plain, dict)
    for path in (*GROUPS, "task.args", "model.config"):
        problems += _no_mapping(plain, path)
    return plain, problems + _deleted_keys(config)


def _deleted_keys(config: DictConfig) -> list[Problem]:
    """Return a Problem for each key of every run that the config lacks, for example after `~seed`."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    holders = {path: raw.get(path) if path else raw for path in CLOSED}
    missing = [
        f"{path}.{field.name}".lstrip(".")
        for path, schema in CLOSED.items()
        for field in dataclasses.fields(schema)
        if isinstance(holders[path], dict) and field.name not in holders[path]
    ]
    fix = "every run needs this key; don't delete it, or set it:"
    return [Problem(key, NOT_SET, f"{fix} +{key}=...") for key in missing]


def _no_mapping(plain: dict[str, Any], path: str) -> list[Problem]:
    """Return a Problem for a group that is not a mapping, and empty the group.

    An interpolation can replace a group with another value.
    """
    outer, _, name = path.rpartition(".")
    holder = plain.get(outer, {}) if outer else plain
    if name not in holder or isinstance(holder[name], dict):
        return []
    value, holder[name] = holder[name], {}
    shown = "null" if value is None else f"'{str(value)[:100]}'"
    return [Problem(path, f"{shown} is not a mapping of keys", f"set its keys one by one: {path}.KEY=...")]


def _read(node: DictConfig | ListConfig, path: str, problems: list[Problem]) -> dict[str, Any] | list[Any]:
    keys: list[Any] = list(range(len(node))) if isinstance(node, ListConfig) else list(node.keys())
    found: list[tuple[Any, Any]] = []
    for key in keys:
        key_path = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(node, key):
            problems.append(Problem(key_path, NOT_SET, f"set it: {key_path}=..."))
            continue
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            continue  # the interpolation's target already has a Problem
        except OmegaConfBaseException as error:
            problems.append(Problem(key_path, _interpolation_message(node, key, error)))
            continue
        found.append((key, _read(value, key_path, problems) if isinstance(value, (DictConfig, ListConfig)) else value))
    return [value for _, value in found] if isinstance(node, ListConfig) else {str(key): value for key, value in found}


def _interpolation_message(node: DictConfig | ListConfig, key: Any, error: OmegaConfBaseException) -> str:
    raw: Any = OmegaConf.to_container(node, resolve=False)
    text = "auto" if AUTO_LR in str(raw[key]) else raw[key]
    reason = first_line(error).split("resolving interpolation: ")[-1].strip('"')
    return f"'{text}' can't be resolved: {reason}"


def unknown_keys(plain: dict[str, Any], config: DictConfig) -> list[Problem]:
    """Return a Problem for each unknown key of this program, because Hydra accepts any key with a `+`."""
    problems = []
    for path, schema in CLOSED.items():
        names = [field.name for field in dataclasses.fields(schema)]
        holder = plain.get(path, {}) if path else plain
        unknown = [key for key in holder if key not in names] if isinstance(holder, dict) else []
        # Without the unknown keys, or each would be its own suggestion.
        known = {name: value for name, value in holder.items() if name in names} if unknown else {}
        for key in unknown:
            key_path = f"{path}.{key}" if path else key
            if meant := meant_overrides(key, str(holder[key]), {**plain, path: known} if path else known):
                problems.append(Problem(key_path, "there is no such key", f"write {meant}"))
                continue
            fix = f"{path or 'the config'} has the keys {', '.join(names)}"
            problems.append(Problem(key_path, f"there is no such key{nearest(key, names)}", fix))
    return problems + _unread_loraplus_keys(config)


def _rates_in(rules: dict[str, Any]) -> list[Any]:
    each = [rule for named in rules.values() if isinstance(named, dict) for rule in named.values()]
    return [rule[key] for rule in each if isinstance(rule, dict) for key in ("lr", "ratio") if key in rule]


def _unread_loraplus_keys(config: DictConfig) -> list[Problem]:
    """Return a Problem for each key of `loraplus` that no rule of the preset uses."""
    if not isinstance(config.get("loraplus"), DictConfig):
        return []
    raw: Any = OmegaConf.to_container(config.loraplus, resolve=False)
    rules = {key: raw.get(key) for key in ("rules", "extra_rules")}
    read = set(re.findall(r"\$\{[^}]*?\.*(\w+)\}", str(rules)))
    if not read:  # in a run's stored config.yaml the rules have values instead of references
        read = {str(key) for key, value in raw.items() if key not in rules and value in _rates_in(rules)}
    used = [str(key) for key in raw if key in read]
    return [
        Problem(
            f"loraplus.{key}",
            f"no rule of this preset uses it{nearest(str(key), used)}",
            f"the preset uses {', '.join(used) or 'none'}; other presets use other keys (loraplus=default)",
        )
        for key in raw
        if key not in ("rules", "extra_rules") and key not in read
    ]
