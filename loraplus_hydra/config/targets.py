"""The only caller of Hydra's `instantiate` and of imports by name.

Everything a config names by a dotted path comes through here. Hydra 1.4 will want a whitelist at `instantiate`, and
what a `_target_` may be is one question, so it has one place (`loraplus_hydra.check` asks it before any call).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from loraplus_hydra.errors import UserError, nearest


def locate(path: str) -> Any:
    """The object that the dotted `path` names, e.g. `torch.optim.AdamW` -> that class.

    Raises UserError saying which part isn't there, with the nearest name that is.
    """
    parts = str(path).split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"'{path}' is no dotted path such as torch.optim.AdamW")
    if parts[0] in sys.stdlib_module_names or any(part.startswith("__") for part in parts):
        # Some do things on import, and what a config can name is never among them.
        raise UserError(f"'{path}' is part of Python itself, which has nothing that a config could use")
    found: Any = None
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # Only the module we asked for may be missing; a missing import inside it is the user's to know.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise UserError(f"'{path}': importing {module} failed: {error}") from error
            continue
        except Exception as error:
            raise UserError(f"'{path}': importing {module} failed: {type(error).__name__}: {error}") from error
        break
    if found is None:
        raise UserError(f"'{path}': there is no package '{parts[0]}' here; is it installed?")
    for name in parts[depth:]:
        try:
            found = getattr(found, name)
        except AttributeError:
            place = getattr(found, "__name__", type(found).__name__)
            raise UserError(f"'{path}': {place} has no '{name}'{nearest(name, dir(found))}") from None
        except ImportError as error:  # a lazily imported attribute whose own requirements are missing
            raise UserError(f"'{path}': {error}") from error
    return found


def instantiate(config: Any, **kwargs: Any) -> Any:
    """Call the `_target_` of a config with its other keys, nested targets too, as plain Python containers."""
    import hydra.utils
    from hydra.errors import InstantiationException

    try:
        # _convert_="all": PEFT and transformers serialise what they are given and can't serialise a DictConfig.
        return hydra.utils.instantiate(config, _convert_="all", **kwargs)
    except InstantiationException as error:
        # What the target itself raised says more than that calling it failed.
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
