"""What may be named at each place of a config, told without a call: a class by its bases, a function by its own word.

Nobody can know what a function does before it is called, and a config may come from anybody. So a function must say
what it returns (`-> DatasetDict`): none of those that read pickles, start programs or evaluate text says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any


def derives(*bases: type) -> Callable[[Any], bool]:
    """Whether something is a class derived from one of `bases`."""
    return lambda found: isinstance(found, type) and issubclass(found, bases)


def returns_rows(found: Any) -> bool:
    """Whether something is a function that says it returns a `datasets.DatasetDict`, or that class itself."""
    from datasets import DatasetDict, IterableDatasetDict

    return derives(DatasetDict, IterableDatasetDict)(found) or _says(found, r"(Iterable)?DatasetDict")


def returns_examples(found: Any) -> bool:
    """Whether something is a function that says it returns Examples."""
    return _says(found, "Examples")


def makes_schedule(found: Any) -> bool:
    """Whether something is a schedule's class, one of transformers' functions, or a function that says it makes one."""
    from torch.optim.lr_scheduler import LRScheduler

    # transformers' own say nothing of what they return.
    transformers = getattr(found, "__module__", None) == "transformers.optimization"
    ours = transformers and str(getattr(found, "__name__", "")).startswith("get_")
    return derives(LRScheduler)(found) or (callable(found) and ours) or _says(found, r"\w*(LR|LRScheduler)")


def is_auto_class(found: Any) -> bool:
    """Whether something is one of transformers' auto classes of models, which load and build by a config."""
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    return derives(_BaseAutoModelClass)(found)


def is_peft_settings(found: Any) -> bool:
    """Whether something is one of PEFT's nested settings, such as `peft.LoftQConfig`: a dataclass of its own."""
    home = str(getattr(found, "__module__", ""))
    return isinstance(found, type) and dataclasses.is_dataclass(found) and home.split(".")[0] == "peft"


def _says(found: Any, name: str) -> bool:
    """Whether a function's annotation says that it returns what is called `name`, alone or among others."""
    if not callable(found) or isinstance(found, type):
        return False
    try:
        said = inspect.signature(found).return_annotation
    except (TypeError, ValueError):
        return False
    if said is inspect.Signature.empty:
        return False
    text = said.__qualname__ if isinstance(said, type) else str(said)
    return re.search(rf"(?<!\w){name}(?!\w)", text) is not None
