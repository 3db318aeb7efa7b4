"""Rules for the classes and functions that a `_target_` may be.

A class is accepted by its base classes, and a function by its return annotation (`-> DatasetDict`). Nothing is called
to decide. The effect of a function is unknown before it is called, and a config may be untrusted. Functions that read
pickles, start programs or evaluate text have no such annotation.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from datasets import DatasetDict, IterableDatasetDict
from torch.optim.lr_scheduler import LRScheduler
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import Problem, UserError

TARGET = "_target_"


def resolve(
    path: Any, key: str, kind: Callable[[Any], bool], wanted: str, annotation: str = ""
) -> tuple[Any, list[Problem]]:
    """Return the object at a dotted path, or None and a Problem at `key` if it isn't `wanted`.

    `kind` returns True for a valid object. `annotation` is the return annotation that a function needs. If the path is
    None, there is no Problem, because a missing path is reported elsewhere.
    """
    if path is None:
        return None, []
    try:
        found = locate(path)
    except UserError as error:
        return None, [Problem(key, str(error), f"use {wanted}")]
    if not kind(found) and annotation and inspect.isfunction(found) and "return" not in found.__annotations__:
        return None, [Problem(key, f"'{path}' doesn't declare what it returns", f"add `-> {annotation}` to it")]
    if not kind(found):
        return None, [Problem(key, f"'{path}' is {_describe(found)}", f"it must be {wanted}")]
    return found, []


def derives(*bases: type) -> Callable[[Any], bool]:
    """Return a predicate for classes derived from one of `bases`."""
    return lambda found: isinstance(found, type) and issubclass(found, bases)


is_auto_class = derives(_BaseAutoModelClass)


def returns(name: str) -> Callable[[Any], bool]:
    """Return a predicate for functions whose return annotation contains `name`."""
    return lambda found: _is_annotated(found, name)


def returns_rows(found: Any) -> bool:
    """Return True for `datasets.DatasetDict` and for a function annotated to return it."""
    return derives(DatasetDict, IterableDatasetDict)(found) or _is_annotated(found, r"(Iterable)?DatasetDict")


def makes_schedule(found: Any) -> bool:
    """Return True for a schedule class or a function that returns a schedule.

    Such functions are transformers' own, and functions annotated to return a schedule.
    """
    in_transformers = getattr(found, "__module__", None) == "transformers.optimization"
    # transformers' own functions have no annotation.
    is_transformers = callable(found) and in_transformers and str(getattr(found, "__name__", "")).startswith("get_")
    return derives(LRScheduler)(found) or is_transformers or _is_annotated(found, r"\w*(LR|LRScheduler)")


def is_peft_settings(found: Any) -> bool:
    """Return True for a dataclass of PEFT's nested settings, such as `peft.LoftQConfig`."""
    home = str(getattr(found, "__module__", ""))
    return isinstance(found, type) and dataclasses.is_dataclass(found) and home.split(".")[0] == "peft"


def _is_annotated(found: Any, name: str) -> bool:
    """Return True for a function whose return annotation contains `name`."""
    if not callable(found) or isinstance(found, type):
        return False
    try:
        annotation = inspect.signature(found).return_annotation
    except (TypeError, ValueError):
        return False
    if annotation is inspect.Signature.empty:
        return False
    text = annotation.__qualname__ if isinstance(annotation, type) else str(annotation)
    return re.search(rf"(?<!\w){name}(?!\w)", text) is not None


def _describe(found: Any) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}"
    if callable(found) and hasattr(found, "__name__"):
        return f"the function {found.__name__}"
    return f"a {type(found).__name__}"
