"""The pages of the reference on the config: one for each group, made from the YAML files and the schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraplus_hydra.config.schema import GROUPS, LIBRARY_RANGES, SCHEMAS, RunConfig, TuneConfig
from loraplus_hydra.config.types import Range, describe, field_types
from tools.docs.markdown import code, prose
from tools.docs.yaml_keys import Key, Option, read_option

FOLDER = "reference/groups"
_SHARED = {"model": "hub", "trainer": "default"}  # group -> the option that explains the keys of the others
_KINDS = {"bool": "true or false", "int": "a number", "float": "a number", "str": "text", "seq": "a list"}


def group_pages(conf: Path) -> dict[str, str]:
    """Return {page: Markdown} with a page for each group."""
    folders = sorted(path for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {f"{FOLDER}/{folder.name}.md": _group_page(folder) for folder in folders}


def _group_page(folder: Path) -> str:
    group = folder.name
    options = [read_option(path) for path in sorted(folder.glob("*.yaml"))]
    shared = next((option for option in options if option.name == _SHARED.get(group)), None)
    known = {key.name: key.comment for key in shared.keys} if shared else {}
    about = GROUPS[group].__doc__ or "" if group in GROUPS else "Each option changes keys of several groups."
    listed = [f"[{code(option.name)}](#{option.name})" for option in options]
    parts = [f"# {code(group)}", prose(about, FOLDER), "Options: " + ", ".join(listed)]
    for option in options:
        parts += [f"## {option.name}", *option_parts(option, group, FOLDER, known)]
    return "\n\n".join(parts) + "\n"


def top_page(conf: Path) -> str:
    """Return the page on the keys outside the groups."""
    parts = ["# Keys outside the groups"]
    for name, heading in (("run", "A run"), ("config", "The program"), ("app", "Hydra's settings")):
        parts += [f"## {heading}", *option_parts(read_option(conf / f"{name}.yaml"), "", "reference", {})]
    return "\n\n".join(parts) + "\n"


def option_parts(option: Option, group: str, folder: str, known: dict[str, str]) -> Iterator[str]:
    """Yield the paragraphs on a YAML file. `known` has comments of keys that this file doesn't explain."""
    if option.text:
        yield prose(option.text, folder)
    if option.commands:
        yield "```bash\n" + "\n".join(option.commands) + "\n```"
    chosen = [_choice(words, comment, folder) for words, comment in option.defaults if words != "app"]
    if chosen:
        yield "Starts from " + ", ".join(chosen) + "."
    prefix = "" if option.is_global or not group else f"{group}."
    for key in option.keys:
        yield _entry(key, prefix, option.name, folder, known)
    if option.notes:
        yield "\n".join(f"- {code(names)}: {prose(meaning, folder)}" for names, meaning in option.notes)


def _choice(words: str, comment: str, folder: str) -> str:
    return code(words) + (f" ({prose(comment, folder)})" if comment else "")


def _entry(key: Key, prefix: str, option: str, folder: str, known: dict[str, str]) -> str:
    """Return a definition: name, value and type, and below them the comment."""
    name = f"{prefix}{key.name}"
    head = f"{code(name)}{{#{option}.{key.name.replace('/', '-')}}}"
    value = "" if key.nested else _value(key, name, prefix)
    kind = _type(name, key)
    comment = prose(key.comment or known.get(key.name, ""), folder)
    block = "\n\n    ```yaml\n" + re.sub("^", "    ", key.value, flags=re.MULTILINE) + "\n    ```" if key.nested else ""
    if "\n" in value:
        block, value = "\n\n    ```text\n" + re.sub("^", "    ", value, flags=re.MULTILINE) + "\n    ```", ""
    return f"{head}{value}{f' ({kind})' if kind else ''}\n:   {comment or 'Keys:'}{block}"


def _value(key: Key, name: str, prefix: str) -> str:
    if key.value == "???":
        return " must be set"
    if "\n" in key.value or (key.tag == "map" and not key.value):
        return key.value
    if path := re.fullmatch(r"\$\{(\.+)(\w[\w.]*)\}", key.value):
        above = name.split(".")[: -len(path[1])]
        return f" = the value of {code('.'.join([*above, path[2]]))}"
    return f" = {code(key.value)}"


def _type(name: str, key: Key) -> str:
    """Return the type or range of a key: the schema's, or else the kind of its value."""
    known = types().get(name)
    if known is not None and known[0] is not Any:
        return describe(*known)
    return (
        "" if name.endswith("_target_") else _KINDS.get(key.tag, "") if not key.value.startswith(("${", "???")) else ""
    )


def types() -> dict[str, tuple[Any, Range | None]]:
    """Return {dotted key: (type, range)} of the keys that this program reads itself."""
    schemas = {"": RunConfig, "tune.": TuneConfig, "sweep.": SCHEMAS["sweep_schema"]}
    schemas |= {f"{group}.": schema for group, schema in GROUPS.items()}
    found = {prefix + name: known for prefix, schema in schemas.items() for name, known in field_types(schema).items()}
    return found | LIBRARY_RANGES
