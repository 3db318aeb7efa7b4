"""The pages of the reference on the config, made from the YAML files and the schema."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplus_hydra.config.schema import GROUPS, LIBRARY_RANGES, SCHEMAS, RunConfig, TuneConfig
from loraplus_hydra.config.types import Range, describe, field_types
from tools.docs.markdown import code, prose
from tools.docs.yaml_keys import Key, Option, read_option

Types = dict[str, tuple[Any, Range | None]]
FOLDER = "reference/groups"
_SHARED = {"model": "hub", "trainer": "default"}  # group -> the option that explains the keys of the others
_KINDS = {"bool": "true or false", "int": "a number", "float": "a number", "str": "text", "seq": "a list"}


@dataclass(frozen=True)
class Place:
    """The page of options: its folder, the group as a prefix of their keys, and what is known of the keys."""

    folder: str
    prefix: str
    types: Types
    comments: dict[str, str] = field(default_factory=dict)  # on keys that an option doesn't explain itself


def group_pages(conf: Path) -> dict[str, str]:
    """Return {page: Markdown} with a page for each group."""
    folders = sorted(path for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {f"{FOLDER}/{folder.name}.md": _group_page(folder) for folder in folders}


def _group_page(folder: Path) -> str:
    group = folder.name
    options = [read_option(path) for path in sorted(folder.glob("*.yaml"))]
    shared = next((option for option in options if option.name == _SHARED.get(group)), None)
    place = Place(FOLDER, f"{group}.", run_types(), {key.name: key.comment for key in shared.keys} if shared else {})
    about = GROUPS[group].__doc__ or "" if group in GROUPS else "Each option changes keys of several groups."
    listed = [f"[{code(option.name)}](#{option.name})" for option in options]
    parts = [f"# {code(group)}", prose(about, FOLDER), "Options: " + ", ".join(listed)]
    for option in options:
        parts += [f"## {option.name}", *option_parts(option, place)]
    return "\n\n".join(parts) + "\n"


def top_page(conf: Path) -> str:
    """Return the page on the keys outside the groups."""
    parts = ["# Keys outside the groups"]
    for name, heading in (("run", "A run"), ("config", "The program"), ("app", "Hydra's settings")):
        parts += [
            f"## {heading}",
            *option_parts(read_option(conf / f"{name}.yaml"), Place("reference", "", run_types())),
        ]
    return "\n\n".join(parts) + "\n"


def option_parts(option: Option, place: Place) -> Iterator[str]:
    """Yield the paragraphs on a YAML file."""
    if option.text:
        yield prose(option.text, place.folder)
    if option.commands:
        yield "```bash\n" + "\n".join(option.commands) + "\n```"
    chosen = [_choice(words, comment, place.folder) for words, comment in option.defaults if words != "app"]
    if chosen:
        yield "Starts from " + ", ".join(chosen) + "."
    for key in option.keys:
        yield _entry(key, "" if option.is_global else place.prefix, option.name, place)
    if option.notes:
        yield "\n".join(f"- {code(names)}: {prose(meaning, place.folder)}" for names, meaning in option.notes)


def _choice(words: str, comment: str, folder: str) -> str:
    return code(words) + (f" ({prose(comment, folder)})" if comment else "")


def _entry(key: Key, prefix: str, option: str, place: Place) -> str:
    """Return a definition: name, value and type, and below them the comment."""
    name = f"{prefix}{key.name}"
    kind = _type(name, key, place.types)
    is_block = key.nested or "\n" in key.value
    head = f"<code id='{option}.{key.name}'>{html.escape(name)}</code>{'' if is_block else _value(key, name)}"
    kind = f" ({kind})" if kind else ""
    comment = prose(key.comment or place.comments.get(key.name, ""), place.folder)
    block = "".join(
        f"\n    {line}" for line in ("", f"```{'yaml' if key.nested else 'text'}", *key.value.splitlines(), "```")
    )
    return f"{head}{kind}\n:   {comment or 'Keys:'}{block if is_block else ''}"


def _value(key: Key, name: str) -> str:
    if key.value == "???":
        return " must be set"
    if path := re.fullmatch(r"\$\{(\.+)(\w[\w.]*)\}", key.value):
        above = name.split(".")[: -len(path[1])]
        return f" = the value of {code('.'.join([*above, path[2]]))}"
    return f" = {code(key.value)}" if key.value else ""


def _type(name: str, key: Key, types: Types) -> str:
    """Return the type or range of a key: the schema's, or else the kind of its value."""
    if name in types and types[name][0] is not Any:
        return describe(*types[name])
    is_plain = not (name.endswith("_target_") or key.value.startswith(("${", "???")))
    return _KINDS.get(key.tag, "") if is_plain else ""


def run_types() -> Types:
    """Return {dotted key: (type, range)} of the keys of a run that this program reads itself."""
    schemas = {"": RunConfig, "tune.": TuneConfig, "sweep.": SCHEMAS["sweep_schema"]}
    schemas |= {f"{group}.": schema for group, schema in GROUPS.items()}
    found = {prefix + name: known for prefix, schema in schemas.items() for name, known in field_types(schema).items()}
    return found | LIBRARY_RANGES
