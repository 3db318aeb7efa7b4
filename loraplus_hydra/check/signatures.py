"""Arguments against a signature: names that it doesn't take, names that it needs, values of another type."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from loraplus_hydra.errors import Problem, nearest


def argument_problems(
    target: Callable[..., Any], arguments: Mapping[str, Any], where: str, supplied: tuple[str, ...] = ()
) -> list[Problem]:
    """Problems of calling `target` with `arguments`, whose keys stand in the config below `where`.

    `supplied` are the arguments that we pass ourselves; they may not stand in the config.
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
            fix = f"it takes: {', '.join(offered)}" if len(offered) <= 30 else ""
            problems.append(Problem(key, f"{title} takes no argument '{name}'{nearest(name, offered)}", fix))
        elif name in hints and not fits(value, hints[name]):
            problems.append(Problem(key, f"'{value}' is not {spelt(hints[name])}", "give it such a value"))
    for name in names:
        parameter = parameters[name]
        needed = parameter.default is parameter.empty and not dataclasses.is_dataclass(target)
        if needed and name not in arguments and name not in supplied:
            problems.append(Problem(f"{where}.{name}", f"{title} needs it", f"give it a value: +{where}.{name}=..."))
    return problems


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations that can be read; a dataclass's are its fields'."""
    try:
        if dataclasses.is_dataclass(target):
            return typing.get_type_hints(target)
        called = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        annotations = {name: hint for name, hint in called.__annotations__.items() if name != "return"}
        arguments = types.SimpleNamespace(__annotations__=annotations)
        return typing.get_type_hints(arguments, globalns=called.__globals__)
    except Exception:  # annotations may name what only a type checker imports
        return {}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value from YAML can be meant for `annotation`; True wherever that isn't plain to see."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, str)
    if (annotation if origin is None else origin) in (list, tuple, set):
        return isinstance(value, list)
    if (annotation if origin is None else origin) is dict:
        return isinstance(value, dict)
    return True


def spelt(annotation: Any) -> str:
    """A type in words."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(spelt(argument) for argument in arguments)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    words |= {list: "a list", dict: "a mapping"}
    return words.get(annotation) or words.get(typing.get_origin(annotation)) or str(annotation)
