"""The only module that calls Hydra's `instantiate` or imports by name.

Every dotted path in a config is resolved here. Before any call, `loraplus_hydra.check` decides whether the call is
allowed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from loraplus_hydra.errors import UserError, nearest


def locate(path: str) -> Any:
    """Return the object at a dotted path, such as the class for `torch.optim.AdamW`.

    Raises UserError with the missing part and the nearest existing name.
    """
    parts = str(path).split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"'{path}' is not a dotted path such as torch.optim.AdamW")
    # Importing some modules of the standard library has side effects, and a config needs none of these modules.
    if parts[0] in sys.stdlib_module_names or any(part.startswith("__") for part in parts):
        raise UserError(f"'{path}' is part of Python itself, which has nothing that a config could use")
    found, attributes = _import_longest(parts)
    for name in attributes:
        try:
            found = getattr(found, name)
        except AttributeError:
            place = getattr(found, "__name__", type(found).__name__)
            raise UserError(f"'{path}': {place} has no '{name}'{nearest(name, dir(found))}") from None
        except ImportError as error:  # a lazily imported attribute whose own requirements are missing
            raise UserError(f"'{path}': {error}") from error
    return found


def _import_longest(parts: list[str]) -> tuple[Any, list[str]]:
    """Return the longest part of a dotted path that is a module, and the remaining parts."""
    path = ".".join(parts)
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            return importlib.import_module(module), parts[depth:]
        except ModuleNotFoundError as error:
            # The module exists, but one of its own imports is missing.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise UserError(f"'{path}': importing {module} failed: {error}") from error
        except Exception as error:
            raise UserError(f"'{path}': importing {module} failed: {type(error).__name__}: {error}") from error
    raise UserError(f"'{path}': there is no installed package '{parts[0]}'")


def instantiate(config: Any, **kwargs: Any) -> Any:
    """Call a config's `_target_` with its other keys as arguments.

    Nested targets are called, too. Arguments are plain Python containers.
    """
    try:
        # _convert_="all": PEFT and transformers serialise their arguments, and can't serialise a DictConfig.
        return hydra.utils.instantiate(config, _convert_="all", **kwargs)
    except InstantiationException as error:
        # The target's own error is more precise than Hydra's error about the call.
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
