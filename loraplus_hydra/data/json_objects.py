"""Objects of a JSON file: one per line, in an array, or one after another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from loraplus_hydra.errors import UserError, first_line

Row = dict[str, Any]

_WRAPPERS = ("data", "rows", "examples", "items", "train")  # usual keys of a list of rows in a single object


def json_objects(path: str, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
    """Yield (place, object) for the objects of a file.

    Lines are read one by one if each line is an object. Raises UserError with the place.
    """
    lines = iter(lines)
    first, second = list(_through_next(lines)), list(_through_next(lines))
    beginning = first[-1] if first else ""
    alone = not any(line.strip() for line in second)
    if alone or beginning.lstrip().startswith("[") or _ends_early(beginning):
        yield from _read_whole(path, "".join(chain(first, second, lines)))
        return
    for number, line in enumerate(chain(first, second, lines), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            with _errors_of(place):
                row = json.loads(line, object_pairs_hook=_unique)
            yield place, _object(row, place, surrogates="\\ud" in line.lower())


def _through_next(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines until one that isn't empty."""
    for line in lines:
        yield line
        if line.strip():
            return


def _ends_early(line: str) -> bool:
    """Return True if a line is only the beginning of a JSON value."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line.lstrip().startswith("{") and error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _read_whole(path: str, text: str) -> Iterator[tuple[str, Row]]:
    """Yield the objects of an array, or objects of several lines that follow one another."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    surrogates = "\\ud" in text.lower()
    position = _after_space(text, 0)
    line, values = 1 + text.count("\n", 0, position), 0
    while position < len(text):
        with _errors_of(f"{path}, line {line}", file=path):
            value, end = decoder.raw_decode(text, position)
        end = _after_space(text, end)
        if values == 0 and end == len(text):
            _refuse_wrapped(path, value)
        listed = isinstance(value, list)
        for number, row in enumerate(value if listed else [value], start=1):
            place = f"{path}, item {number}" if listed else f"{path}, line {line}"
            yield place, _object(row, place, surrogates=surrogates)
        line += text.count("\n", position, end)
        position, values = end, values + 1


def _after_space(text: str, position: int) -> int:
    """Return the position of the next character that isn't white space."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _refuse_wrapped(path: str, value: Any) -> None:
    """Raise UserError for a single object that contains the list of rows."""
    for name in _WRAPPERS:
        rows = value.get(name) if isinstance(value, dict) else None
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            what = f"the file is one object, and its key '{name}' is a list of {len(rows):,} objects"
            raise UserError(f"{path}: {what}; write only this list into the file")


@contextmanager
def _errors_of(place: str, *, file: str | None = None) -> Iterator[None]:
    """Turn errors of Python's JSON decoder into UserErrors.

    If the text is that of a whole `file`, the decoder knows the line of an error.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        place = place if file is None else f"{file}, line {error.lineno}"
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # Python refuses a number with thousands of digits
        raise UserError(f"{place}: {first_line(error)}") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object. Raises ValueError for a repeated key, because Python would drop the first value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key '{twice[:40]}' twice")
    return row


def _object(row: Any, place: str, *, surrogates: bool) -> Row:
    """Return a decoded value. Raises UserError unless it is an object with valid Unicode text.

    If `surrogates` is False, the text is not checked, because it can't contain surrogates.
    """
    if not isinstance(row, dict):
        hint = "; write a JSON array as one object per line" if isinstance(row, list) else ""
        raise UserError(f"{place}: a {type(row).__name__}, but an object like {{...}} is needed{hint}")
    if surrogates and not _is_unicode(row):
        raise UserError(f"{place}: half of a surrogate pair, which is not a valid character")
    return row


def _is_unicode(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
