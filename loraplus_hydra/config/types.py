"""Types and ranges of values; dataclasses from JSON.

This module uses only the standard library, so every package can import it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
_METADATA = "range"
_COUNT = "[number of iters]"  # how PEFT annotates a number inside a text: pissa_niter_[number of iters]
_TEXTS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True)
class Range:
    """Limits on a value in addition to its type; `text` completes 'it must be ...'.

    `holds` is called only with values of the right type, never with None.
    """

    text: str
    holds: Callable[[Any], bool]


def is_finite(value: float) -> bool:
    """Return True for a number that a float can represent.

    False for NaN, infinities and too large integers.
    """
    return -sys.float_info.max <= value <= sys.float_info.max


FINITE = Range("a finite number", is_finite)
POSITIVE = Range("a finite number above 0", lambda x: is_finite(x) and x > 0)
NOT_NEGATIVE = Range("a finite number from 0 on", lambda x: is_finite(x) and x >= 0)
COUNT = Range("a whole number from 1 on", lambda x: x >= 1)
WHOLE = Range("a whole number from 0 on", lambda x: x >= 0)


def range_(limits: Range) -> dict[str, Range]:
    """Return a dataclass field's metadata with a range: `field(metadata=range_(POSITIVE))`."""
    return {_METADATA: limits}


@functools.cache
def field_types(schema: Any) -> dict[str, tuple[Any, Range | None]]:
    """Return {field: (annotation, range or None)} of a dataclass."""
    hints = typing.get_type_hints(schema)
    return {each.name: (hints[each.name], each.metadata.get(_METADATA)) for each in dataclasses.fields(schema)}


def fits(value: Any, annotation: Any) -> bool:
    """Return True if a value from YAML or JSON fits the type `annotation`.

    An annotation that this function doesn't know accepts any value.

    A mapping's keys are not checked, because YAML and JSON turn them into text. For a dataclass, a mapping with a
    `_target_` fits.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(_is_literal(value, argument) for argument in arguments)
    kind = annotation if origin is None else origin
    if kind in (list, tuple, set):
        return isinstance(value, list) and all(map(fits, value, _item_types(kind, arguments, len(value))))
    if kind is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values() if arguments)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:  # in Python a bool is an int
        return isinstance(value, int) and not isinstance(value, bool)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict) and "_target_" in value
    return isinstance(value, kind) if kind in (bool, str, type(None)) else True


def mismatch(value: Any, annotation: Any, limits: Range | None = None) -> str:
    """Return an error such as 'is not a number' if `value` doesn't fit its type or range; otherwise empty."""
    if not fits(value, annotation):
        return f"is not {describe(annotation, null=False)}"
    return "is out of range" if limits and value is not None and not limits.holds(value) else ""


def describe(annotation: Any, limits: Range | None = None, *, null: bool = True) -> str:
    """Return a type, or its range if it has one, as text. `null=False` omits 'or null'."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if limits is not None:
        return limits.text + (", or null" if type(None) in arguments and null else "")
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments if null or each is not type(None))
    if origin in (list, dict) and arguments[-1] in _TEXTS:
        return f"{_TEXTS[origin]} of {_TEXTS[arguments[-1]].removeprefix('a ')}s"
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return f"a mapping with _target_: {annotation.__module__}.{annotation.__qualname__}"
    return _TEXTS.get(annotation) or _TEXTS.get(origin) or str(annotation)


def from_plain(schema: type[T], plain: Any) -> T:
    """Return an instance of the dataclass `schema`, built from JSON's mapping. Unknown keys are ignored.

    If a key is a reserved word of Python, its field has a trailing underscore. Raises ValueError with the keys whose
    values do not fit.
    """
    given = plain if isinstance(plain, dict) else {}
    known: dict[str, tuple[Any, Range | None]] = field_types(typing.cast(Any, schema))
    values, wrong = {}, []
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        key = field.name.rstrip("_")
        if key not in given and (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING):
            continue
        try:
            values[field.name] = _converted(given[key], *known[field.name])
        except (KeyError, ValueError):
            wrong.append(key)
    if wrong:
        raise ValueError(", ".join(wrong))
    return schema(**values)


def to_plain(built: Any) -> dict[str, Any]:
    """Return a dataclass instance as a mapping that `from_plain` reads."""
    return dataclasses.asdict(built, dict_factory=lambda items: {key.rstrip("_"): value for key, value in items})


def _converted(value: Any, annotation: Any, limits: Range | None) -> Any:
    if dataclasses.is_dataclass(annotation):
        return from_plain(typing.cast(Any, annotation), value)
    item: Any = (*typing.get_args(annotation), None)[1] if typing.get_origin(annotation) is dict else None
    if dataclasses.is_dataclass(item) and isinstance(value, dict):
        return {key: from_plain(typing.cast(Any, item), each) for key, each in value.items()}
    if why := mismatch(value, annotation, limits):
        raise ValueError(why)
    return value


def _is_literal(value: Any, literal: Any) -> bool:
    if isinstance(literal, str) and _COUNT in literal:
        before, after = map(re.escape, literal.split(_COUNT))
        return isinstance(value, str) and re.fullmatch(f"{before}[0-9]+{after}", value) is not None
    return bool(value == literal)


def _item_types(kind: type, arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Return one annotation for each of `count` items. Items beyond a tuple's length may have any value."""
    if kind is tuple and len(arguments) == count and Ellipsis not in arguments:
        return arguments
    return (arguments[0] if arguments and (kind is not tuple or Ellipsis in arguments) else Any,) * count
