"""Checks of arguments against a signature: unknown names, missing names, wrong types."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from loraplus_hydra.config.schema import LIBRARY_RANGES
from loraplus_hydra.config.synonyms import own_name
from loraplus_hydra.config.types import describe, fits
from loraplus_hydra.errors import Problem, nearest

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def argument_problems(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    where: str,
    supplied: tuple[str, ...] = (),
    also_valid: Collection[str] = (),
) -> list[Problem]:
    """Return the errors of calling `target` with `arguments`, with keys that begin with `where`.

    `supplied` are arguments that the run passes itself, so the config must not have them. `also_valid` are other keys
    below `where`, which are offered as corrections of a mistyped name.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return []
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    named = {name: each for name, each in parameters.items() if each.kind not in _VARIABLE and name != "self"}
    offered = {name: each for name, each in named.items() if name not in supplied}
    hints, title = _hints(target), getattr(target, "__name__", str(target))
    problems = []
    for name, value in arguments.items():
        key = f"{where}.{name}"
        if name in supplied:
            problems.append(Problem(key, "is passed by the run itself", "remove it"))
        elif name not in named and not takes_any:
            fix = f"it takes {', '.join(offered) or 'none'}" if len(offered) <= 30 else ""
            hint = nearest(own_name(name, where), [*offered, *also_valid])
            problems.append(Problem(key, f"{title} takes no argument '{name}'{hint}", fix))
        elif name in hints and not fits(value, hints[name]) and not _is_wider(key, value):
            problems.append(Problem(key, f"'{value}' is not {describe(hints[name])}", "give it a value of this type"))
    # A dataclass of settings checks its required fields when it is instantiated.
    missing = [] if dataclasses.is_dataclass(target) else [name for name in offered if name not in arguments]
    return problems + [
        Problem(f"{where}.{name}", f"{title} needs this argument", f"set it: +{where}.{name}=...")
        for name in missing
        if offered[name].default is inspect.Parameter.empty
    ]


def _is_wider(key: str, value: Any) -> bool:
    """Return True if the program's type of this key takes the value."""
    # PEFT declares lora_alpha as an int, but any number works
    return key in LIBRARY_RANGES and fits(value, LIBRARY_RANGES[key][0])


def documented_value_problems(target: type, arguments: Mapping[str, Any], where: str) -> list[Problem]:
    """Check texts against 'Possible values' in the help of a dataclass's fields.

    TRL documents values in this way, but checks them only after the model is loaded.
    """
    problems = []
    for field in dataclasses.fields(target):
        _, listed, text = str(field.metadata.get("help")).partition("Possible values are")
        known = re.findall(r"`'([\w-]+)'`", text.split(". ")[0])
        given = arguments.get(field.name)
        for value in given if isinstance(given, list) else [given]:
            if listed and known and isinstance(value, str) and value not in known:
                what = f"there is no '{value}'{nearest(value, known)}"
                problems.append(Problem(f"{where}.{field.name}", what, f"use one of {', '.join(known)}"))
    return problems


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations that can be evaluated. For a dataclass, these are its fields' annotations."""
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
        with suppress(Exception):  # an annotation may use names that only a type checker imports
            hints |= typing.get_type_hints(types.SimpleNamespace(__annotations__={name: hint}), globalns=names)
    return hints
