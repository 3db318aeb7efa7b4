"""Arguments against a signature: names that it doesn't take, names that it needs, values of another type."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from loraplus_hydra.config.types import describe, fits
from loraplus_hydra.errors import Problem, nearest


def argument_problems(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    where: str,
    supplied: tuple[str, ...] = (),
    also_valid: Collection[str] = (),
) -> list[Problem]:
    """Problems of calling `target` with `arguments`, whose keys stand in the config below `where`.

    `supplied` are the arguments that we pass ourselves; they may not stand in the config. `also_valid` are the keys
    below `where` that are no arguments of `target`, but may be meant by a mistyped one.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return []
    names = [name for name, kind in parameters.items() if kind.kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD)]
    names = [name for name in names if name != "self"]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(target)
    title = getattr(target, "__name__", str(target))
    problems = []
    for name, value in arguments.items():
        key = f"{where}.{name}"
        if name in supplied:
            problems.append(Problem(key, "is passed by the run itself", "leave it out"))
        elif name not in names and not takes_any:
            offered = [other for other in names if other not in supplied]
            fix = f"it takes: {', '.join(offered) or 'none'}" if len(offered) <= 30 else ""
            hint = nearest(name, [*offered, *also_valid])
            problems.append(Problem(key, f"{title} takes no argument '{name}'{hint}", fix))
        elif name in hints and not fits(value, hints[name]):
            problems.append(Problem(key, f"'{value}' is not {describe(hints[name])}", "give it such a value"))
    for name in names:
        parameter = parameters[name]
        needed = parameter.default is parameter.empty and not dataclasses.is_dataclass(target)
        if needed and name not in arguments and name not in supplied:
            problems.append(Problem(f"{where}.{name}", f"{title} needs it", f"give it a value: +{where}.{name}=..."))
    return problems


def documented_value_problems(target: type, arguments: Mapping[str, Any], where: str) -> list[Problem]:
    """Check texts against the 'Possible values' of a dataclass field's help, as TRL documents them.

    TRL itself looks at these values only once the model is loaded.
    """
    problems = []
    for field in dataclasses.fields(target):
        _, listed, text = str(field.metadata.get("help")).partition("Possible values are")
        known = re.findall(r"`'([\w-]+)'`", text.split(". ")[0])
        given = arguments.get(field.name)
        for value in given if isinstance(given, list) else [given]:
            if listed and known and isinstance(value, str) and value not in known:
                what = f"there is no '{value}'{nearest(value, known)}"
                problems.append(Problem(f"{where}.{field.name}", what, f"one of: {', '.join(known)}"))
    return problems


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations that can be read; a dataclass's are its fields'."""
    try:
        if dataclasses.is_dataclass(target):
            return typing.get_type_hints(target)
        called = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        annotations = {name: hint for name, hint in called.__annotations__.items() if name != "return"}
        names = called.__globals__
    except Exception:
        return {}
    hints: dict[str, Any] = {}
    for name, hint in annotations.items():
        with suppress(Exception):  # an annotation may name what only a type checker imports
            hints |= typing.get_type_hints(types.SimpleNamespace(__annotations__={name: hint}), globalns=names)
    return hints
