"""An option of the config as documentation: its head, its keys, and the comments beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

_COMMAND = re.compile(r"(\w+=\S+ )?(python -m loraplus_hydra|torchrun)\b")
_NOTE = re.compile(r"#   (\w+(?:, \w+)*): (.+)")  # a comment that explains keys of other files, as in model/hub.yaml


@dataclass(frozen=True)
class Key:
    """A key of a YAML file."""

    name: str  # with dots, from the top of the file
    value: str  # as it is in the file
    tag: str  # YAML's kind of value: int, str, null, map, ...
    comment: str
    nested: bool = False  # True for a mapping whose own keys have no comments: it is shown whole


@dataclass(frozen=True)
class Option:
    """A YAML file: the text and the commands in its first lines, its defaults and its keys."""

    name: str
    text: str
    commands: tuple[str, ...]
    defaults: tuple[tuple[str, str], ...]  # (option or choice, comment)
    keys: tuple[Key, ...]
    notes: tuple[tuple[str, str], ...]  # (names, meaning) in comments below the keys
    is_global: bool  # True if the keys begin at the top of the config, not in the group


def read_option(path: Path) -> Option:
    """Read a YAML file with its comments."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    root = yaml.compose(source)
    head = [line.removeprefix("#").strip() for line in lines[: _length_of_head(lines)]]
    defaults: list[tuple[str, str]] = []
    keys: list[Key] = []
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if key.value == "defaults":
                defaults = list(_defaults(value, lines))
            else:
                keys += _keys(key, value, lines, "")
    return Option(
        name=path.stem,
        text=" ".join(line for line in head if not _COMMAND.match(line) and not line.startswith("@package")),
        commands=tuple(line for line in head if _COMMAND.match(line)),
        defaults=tuple(defaults),
        keys=tuple(keys),
        notes=tuple((match[1], match[2]) for line in lines if (match := _NOTE.match(line))),
        is_global="@package _global_" in head,
    )


def _length_of_head(lines: list[str]) -> int:
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _defaults(node: yaml.Node, lines: list[str]) -> Iterator[tuple[str, str]]:
    for item in node.value:
        comment = _comment(lines, item if isinstance(item, yaml.ScalarNode) else item.value[0][1])
        words = item.value if isinstance(item, yaml.ScalarNode) else "=".join(each.value for each in item.value[0])
        if words != "_self_" and not words.endswith("_schema"):
            yield words.removeprefix("override /"), comment


def _keys(key: yaml.Node, value: yaml.Node, lines: list[str], prefix: str) -> Iterator[Key]:
    """Yield the keys below a key. A mapping whose own keys have no comments is one key."""
    name = f"{prefix}{key.value}"
    is_block = isinstance(value, yaml.MappingNode) and not value.flow_style
    kind = value.tag.rpartition(":")[2]
    if not is_block:
        literal = getattr(value, "style", None) == "|"
        shown = value.value if literal else "\n".join(lines)[value.start_mark.index : value.end_mark.index]
        yield Key(name, shown.strip(), kind, _comment(lines, key if literal else value))
        return
    comment = _comment(lines, key)
    inner = [each for one, below in value.value for each in _keys(one, below, lines, f"{name}.")]
    if not any(each.comment for each in inner):
        block = lines[value.start_mark.line : value.value[-1][1].end_mark.line + 1]
        yield Key(name, "\n".join(line[value.start_mark.column :] for line in block), kind, comment, nested=True)
        return
    if comment:
        yield Key(name, "", kind, comment)
    yield from inner


def _comment(lines: list[str], node: yaml.Node) -> str:
    """Return the comment on the line on which a node ends, and comments on lines of their own above it."""
    end = node.end_mark if isinstance(node, yaml.ScalarNode) or node.flow_style else node.start_mark
    beside = re.search(r"#\s?(.*)$", lines[end.line][end.column :])
    above: list[str] = []
    for line in reversed(lines[_length_of_head(lines) : end.line]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip().removeprefix("# "))
    return ". ".join([*above, beside[1]] if beside else above)
