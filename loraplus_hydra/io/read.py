"""Reader of a run's files (JSON, YAML, JSON lines), which may be broken or untrusted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from loraplus_hydra.errors import UserError, first_line

RESOLVER = re.compile(r"\$\{[^}]*:")  # ${oc.env:HOME}: followed in an untrusted file, it could read the environment
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader takes a tenth of the time
_DEEPEST = 100  # levels; on some ten thousand the C loader ends the process with a segmentation fault
_NAMES: dict[type, str] = {dict: "mapping", list: "list"}


class Unreadable(UserError):
    """A file that can't be read. The text names it and the reason."""


class Missing(Unreadable):
    """A file that doesn't exist."""


class Hostile(Unreadable):
    """YAML that no run writes, and that could fill the memory or end the process."""


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the JSON value in `path`, of Python type `kind`. Raises Missing or Unreadable."""
    return _read(path, kind, json.loads)


def read_yaml(path: Path, kind: type = dict) -> Any:
    """Return the YAML value in `path`, of Python type `kind`. Raises Missing or Unreadable."""
    return _read(path, kind, parse_yaml)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines. Raises Missing or Unreadable."""
    found = []
    for line in _text(path).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a killed run leaves its last line cut short
        if isinstance(value, dict):
            found.append(value)
    return found


def parse_yaml(text: str) -> Any:
    """Return the value of `text` in YAML's safe subset, with OmegaConf's types.

    Raises Unreadable, also for a key that exists twice. Raises Hostile for aliases and for more than 100 levels.
    """
    try:
        _refuse_traps(text)
        return yaml.load(text, Loader=_Loader)
    except Hostile:
        raise
    except Exception as error:  # nearly any: KeyError for `!!bool x`, OverflowError for a date
        raise Unreadable(first_line(error)) from error


def _refuse_traps(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):  # a few lines of aliases can expand to fill any memory
            raise Hostile("it holds YAML aliases, which no run writes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise Hostile(f"it is nested more than {_DEEPEST} levels deep")


class _Loader(_Base):
    """Loader of YAML's safe subset, with the types of OmegaConf's slower one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(f"a key exists twice: {next(key for key in keys if keys.count(key) > 1)}")
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]  # a date stays a string
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.1 takes 1e-4 for a string, since it has no dot
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_multi_constructor(  # OmegaConf writes paths so
    "tag:yaml.org,2002:python/object/apply:pathlib.",
    lambda loader, _, node: Path(*map(str, loader.construct_sequence(node))),
)


def _read(path: Path, kind: type, parse: Any) -> Any:
    text = _text(path)
    try:
        value = parse(text)
    except (ValueError, RecursionError) as error:
        refused = Hostile if isinstance(error, Hostile) else Unreadable
        raise refused(f"{path} can't be read: {first_line(error)[:120]}") from error
    if not isinstance(value, kind):
        held = f"holds a {_NAMES.get(type(value), type(value).__name__)}, not a {_NAMES[kind]}"
        raise Unreadable(f"{path} can't be read: it {'is empty' if value is None else held}")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(f"{path} can't be read: there is no such file") from error
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path} can't be read: it isn't UTF-8 text") from error
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {error.strerror or error}") from error
