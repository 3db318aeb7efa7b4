"""Files of a job's folder, read however broken they are: what can be had of each, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from loraplus_hydra.config.flatten import flat

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader takes a tenth of the time
_HUGE = 1e100
_RESOLVERS = re.compile(r"\$\{\s*[\w.]+\s*:")  # ${oc.env:...}: a stored config is read, never run


class _Loader(_Base):
    """YAML's safe subset, with 1e-4 a number as in OmegaConf (YAML 1.1 asks for a dot in it)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class Unreadable(ValueError):
    """A file that is there and can't be read; its text says why."""


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value in `path`, of the Python type `kind`, or None where there is no such file. Raises Unreadable."""
    text = _text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} isn't whole JSON ({_short(error)})") from error
    if not isinstance(value, kind):
        raise Unreadable(f"{path.name} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def read_yaml(path: Path, kind: type = dict) -> Any:
    """The YAML value in `path`, as `read_json`."""
    text = _text(path)
    if text is None:
        return None
    try:
        value = parse_yaml(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} isn't YAML ({_short(error)})") from error
    if not isinstance(value, kind):
        raise Unreadable(f"{path.name} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def parse_yaml(text: str) -> Any:
    """The value that `text` means in YAML's safe subset. Raises ValueError; so it does for aliases.

    No run writes those, and a few lines of them can stand for more than any memory holds.
    """
    try:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_Base)):
            raise ValueError("it holds YAML aliases, which no run writes")
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, the lines that are none left out: a kill cuts the last one short."""
    text = _text(path) or ""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """A composed config with its interpolations followed; as it stands where one leads nowhere or calls a resolver."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if _RESOLVERS.search(json.dumps(config, default=str)):
        return config
    try:
        value = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=False)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return config
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else config


def flatten(config: Mapping[Any, Any]) -> dict[str, Any]:
    """A nested mapping as dotted key -> leaf. A list is one leaf; interpolations that nobody followed are left out."""
    return {
        key: json.dumps(value, default=str) if isinstance(value, (list, dict)) else value
        for key, value in flat(config).items()
        if not (isinstance(value, str) and value.startswith("${"))
    }


def number(value: Any) -> float | None:
    """`value` as a number whose square is finite too, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _HUGE else None  # NaN is never smaller


def whole(value: Any) -> int | None:
    """`value` as a whole number, or None."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path.name} isn't text") from error
    except OSError as error:
        raise Unreadable(f"{path.name}: {error.strerror or error}") from error


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
