"""Reader of a run's files (JSON, YAML, JSON lines), which may be broken or untrusted.

The reader opens only regular files and limits their size and depth. A FIFO would wait for ever, and a link could point
to any file. Links of a hub cache to its own blobs are followed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import yaml  # type: ignore[import-untyped]

from loraplus_hydra.errors import UserError, first_line
from loraplus_hydra.io.files import is_hub_blob, open_regular

RESOLVER = re.compile(r"\$\{[^}]*:")  # ${oc.env:HOME}; in an untrusted file it could read the environment
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader takes a tenth of the time
_DEEPEST = 100  # levels; at about ten thousand the C loader crashes with a segmentation fault
_LARGEST = 2**26  # bytes of a JSON file
_LARGEST_CONFIG = 2**23  # bytes of config.json, tokenizer_config.json, ...; libraries read it several times
_LARGEST_YAML = 2**21  # a config has some thousand bytes, and YAML is slow
_LARGEST_LINES = 2**28  # a line for each logged step, of some hundred bytes
_MOST_ITEMS = 2**24  # maximum number of values in a JSON text; `[],` needs 24 times its length in memory
_TOO_DEEP = f"it has more than {_DEEPEST} nested levels"
_NAMES: dict[type, str] = {dict: "mapping", list: "list"}


class Unreadable(UserError):
    """A file that can't be read. The message has the file and the reason."""


class Missing(Unreadable):
    """A file that doesn't exist."""


class Hostile(Unreadable):
    """Malicious YAML, which could fill the memory or end the process."""


def read_bytes(path: Path, largest: int = _LARGEST) -> bytes:
    """Return the content of a regular file.

    Raises Missing, or Unreadable for anything that is not a regular file or is larger than `largest` bytes.
    """
    try:
        with _opened(path) as file:
            if os.fstat(file.fileno()).st_size > largest:
                raise Unreadable(f"{path} can't be read: it is larger than {largest} bytes")
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(f"{path} can't be read: there is no such file") from error
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {_reason(path, error)}") from error


def refuse_large(files: Iterable[Path]) -> None:
    """Raise Unreadable if one of `files` is so large that reading it could fill the memory."""
    for path in files:
        if path.suffix == ".json" and path.is_file():
            largest = _LARGEST_CONFIG if path.stem.endswith("config") else _LARGEST
            _refuse_many_items(read_text(path, largest), str(path))
        elif not path.is_file() or path.stat().st_size <= _LARGEST:
            continue
        elif path.suffix != ".safetensors":
            raise Unreadable(f"{path} can't be read: it is larger than {_LARGEST} bytes")
        elif not _is_covered(path):
            raise Unreadable(f"{path} can't be read: its header doesn't describe all of its bytes")


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path.resolve() if is_hub_blob(path) else path, os.O_RDONLY), "rb")


def _is_covered(path: Path) -> bool:
    """Return True if a safetensors file ends where its header says that the last tensor ends."""
    with _opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LARGEST))
    try:
        entries = parse_json(header.decode("utf-8"))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return bool(8 + length + max(ends, default=0) == path.stat().st_size)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False


def read_or(default: Any, read: Callable[..., Any], *arguments: Any) -> Any:
    """Return `read(*arguments)`, or `default` if it raises Unreadable."""
    try:
        return read(*arguments)
    except Unreadable:
        return default


def read_text(path: Path, largest: int = _LARGEST) -> str:
    """Return the UTF-8 text in a regular file. Raises Missing or Unreadable."""
    try:
        return read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path} can't be read: it isn't UTF-8 text") from error


def inside(folder: Path, *names: str) -> Path:
    """Return the path `folder`/`names`. Raises Unreadable if a folder in `names` is a link."""
    place = folder
    for name in names[:-1]:
        place /= name
        if place.is_symlink():
            raise Unreadable(f"{place} can't be read: it is a link")
    return place / names[-1]


def read_json(path: Path, kind: type = dict, *, largest: int = _LARGEST) -> Any:
    """Return the JSON value in `path`, of Python type `kind`. Raises Missing or Unreadable."""
    return _parse(path, read_text(path, largest), kind, parse_json)


def read_yaml(path: Path, kind: type = dict) -> Any:
    """Return the YAML value in `path`, of Python type `kind`. Raises Missing or Unreadable."""
    return _parse(path, read_text(path, _LARGEST_YAML), kind, parse_yaml)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines. Raises Missing or Unreadable."""
    found = []
    for line in read_bytes(path, _LARGEST_LINES).split(b"\n"):
        try:
            value = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Unreadable(f"{path} can't be read: it isn't UTF-8 text") from error
        except ValueError:
            continue  # a killed run's last line may be incomplete
        if isinstance(value, dict):
            found.append(value)
    return found


def parse_json(text: str) -> Any:
    """Parse `text` as JSON. Raises ValueError, also for more than 100 nested levels or 16 million values."""
    brackets = _refuse_many_items(text)
    try:
        value = json.loads(text)
    except RecursionError:
        raise Unreadable(_TOO_DEEP) from None
    if brackets > _DEEPEST and _is_too_deep(value):
        raise Unreadable(_TOO_DEEP)
    return value


def parse_yaml(text: str) -> Any:
    """Parse `text` as YAML's safe subset, with OmegaConf's types.

    Raises Unreadable, also for a key that exists twice. Raises Hostile for aliases and for more than 100 nested levels.
    """
    try:
        _refuse_traps(text)
        return yaml.load(text, Loader=_Loader)
    except Hostile:
        raise
    except Exception as error:  # the loader raises many types: KeyError for `!!bool x`, ...
        raise Unreadable(first_line(error)) from error


def _refuse_many_items(text: str, path: str = "the text") -> int:
    """Return the number of brackets in `text`. Raises Unreadable for more values than any run writes."""
    brackets = text.count("[") + text.count("{")  # counting is much faster than parsing
    if 2 * brackets + text.count(",") > _MOST_ITEMS:
        raise Unreadable(f"{path} has more than {_MOST_ITEMS:,} values")
    return brackets


def _refuse_traps(text: str) -> None:
    if len(text) <= _DEEPEST and "*" not in text:  # too short to be that deep, and an alias begins with *
        return
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):  # a few lines of aliases can expand until they fill the memory
            raise Hostile("it has YAML aliases, which runs never write")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise Hostile(_TOO_DEEP)


class _Loader(_Base):
    """A loader of YAML's safe subset, faster than OmegaConf's loader but with the same types."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(f"a key exists twice: {next(key for key in keys if keys.count(key) > 1)}")
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]  # a date stays a string
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # in YAML 1.1, 1e-4 is a string, because it has no dot
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_multi_constructor(  # OmegaConf writes paths with this tag
    "tag:yaml.org,2002:python/object/apply:pathlib.",
    lambda loader, _, node: Path(*map(str, loader.construct_sequence(node))),
)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        items = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _parse(path: Path, text: str, kind: type, parse: Any) -> Any:
    try:
        value = parse(text)
    except ValueError as error:
        refused = Hostile if isinstance(error, Hostile) else Unreadable
        raise refused(f"{path} can't be read: {first_line(error)[:120]}") from error
    if not isinstance(value, kind):
        held = f"holds a {_NAMES.get(type(value), type(value).__name__)}, not a {_NAMES[kind]}"
        raise Unreadable(f"{path} can't be read: it {'is empty' if value is None else held}")
    return value


def _reason(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return "it is a link"
    return error.strerror or ("it is not a regular file" if path.exists() else str(error))
