"""Values in stored configs, results and overrides; overrides that run a job again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.config.plain import flat
from loraplus_hydra.config.schema import RUN_GROUPS
from loraplus_hydra.io import checkpoints
from loraplus_hydra.io.read import RESOLVER, parse_yaml, read_or

_HUGE = 1e100


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """Resolve a config's interpolations. Return it unchanged if one fails or calls a resolver."""
    if RESOLVER.search(json.dumps(config, default=str)):
        return config
    try:
        value = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=False)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return config
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else config


def flatten(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a mapping as dotted key -> value, without unresolved interpolations.

    A list is one value, as JSON.
    """
    return {
        key: json.dumps(value, default=str) if isinstance(value, (list, dict)) else value
        for key, value in flat(config).items()
        if not (isinstance(value, str) and value.startswith("${"))
    }


def number(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a usable number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _HUGE else None  # also None for NaN, because a comparison with NaN is False


def identity(value: Any) -> str:
    """Return a text that is the same for equal values. 4 and 4.0 are equal, and 4 and "4" are not."""
    known = number(value)
    return repr(value if known is None else known)


def whole_number(value: Any) -> int | None:
    """Return `value` as an int, or None if it is not a whole number."""
    as_float = number(value)
    return int(as_float) if as_float is not None and as_float == int(as_float) else None


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """Return key -> value for overrides that set a value: `+key=1e-4` gives key: 0.0001."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.lstrip("+").partition("=")
        if not equals or key.startswith("~"):
            continue
        value = read_or(text, parse_yaml, text)
        values[key] = text if isinstance(value, (dict, list)) else value
    return values


def rerun_overrides(
    first: Iterable[str], resumes: Sequence[str], first_config: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """Return the overrides that give a new run the job's config, or None if unknown.

    `first` has the overrides of the job's first start, and `resumes` the overrides of all resumes in order.
    `first_config` is the config of the first start, and `config` the current config, both as dotted key -> value.
    """
    changes: dict[str, str] = {}
    for key in dict.fromkeys(map(_key, resumes)):
        # This key belongs to the resume, not to the run
        if key.split(".")[0] not in RUN_GROUPS or key == checkpoints.KEY:
            continue
        # The configs decide, because a resume may have been refused, and each resume starts from the first config.
        if key in config and config[key] == first_config.get(key):
            continue
        given = {text: override_values([text]) for text in resumes if _key(text) == key}
        setting = [text for text, values in given.items() if key in values and values[key] == config.get(key)]
        if not setting:
            return None
        changes[key] = f"++{setting[-1].lstrip('+')}"  # ++ because the composed config may not have the key
    return (*(text for text in first if _key(text) not in changes), *changes.values())


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
