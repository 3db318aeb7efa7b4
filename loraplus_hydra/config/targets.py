"""The only caller of Hydra's `instantiate` and of imports by name.

Everything that a config names by a dotted path comes through here. `loraplus_hydra.check` decides before any call
whether it is allowed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException

from loraplus_hydra.errors import UserError, nearest


def locate(path: str) -> Any:
    """Return the object that a dotted path names, such as the class for `torch.optim.AdamW`.

    Raises UserError that names the missing part, with the nearest name that exists.
    """
    parts = str(path).split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"'{path}' is no dotted path such as torch.optim.AdamW")
    # Importing some modules of the standard library has effects, and none has anything for a config.
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
    """Import the longest part of a dotted path that is a module. Returns it and the parts after it."""
    path = ".".join(parts)
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            return importlib.import_module(module), parts[depth:]
        except ModuleNotFoundError as error:
            # A module that is missing inside the one asked for is an error.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise UserError(f"'{path}': importing {module} failed: {error}") from error
        except Exception as error:
            raise UserError(f"'{path}': importing {module} failed: {type(error).__name__}: {error}") from error
    raise UserError(f"'{path}': there is no package '{parts[0]}' here; is it installed?")


def instantiate(config: Any, **kwargs: Any) -> Any:
    """Call the `_target_` of a config with its other keys, nested targets too, as plain Python containers."""
    try:
        # _convert_="all": PEFT and transformers serialise their arguments, and can't serialise a DictConfig.
        return hydra.utils.instantiate(config, _convert_="all", **kwargs)
    except InstantiationException as error:
        # The target's own error says more than that calling it failed.
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
