"""Dotted paths in a stored run's config that must not be imported.

These are paths to code in the run's own folder, and paths that this package has renamed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraplus_hydra.config.locations import PACKAGE_SCHEME
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import Problem, UserError

# Keys whose value is a dotted path to import, and keys whose value may be a package's folder.
_IMPORTED = ("_target_", "args_class", "auto_class", "examples")
_LOCATIONS = ("model.path", "model.tokenizer")


def foreign_code(plain: Any, folder: Path) -> list[Problem]:
    """Return a Problem for each dotted path in a plain config to code inside `folder`."""
    place = folder.resolve()
    return [
        Problem(
            key,
            f"'{name}' is code in the run's own folder",
            "use an installed package",
        )
        for key, name in _names(plain, "")
        if any(_inside(source, place) for source in _sources(name, place))
    ]


def moved_paths(plain: Any) -> list[str]:
    """Return the dotted paths in a plain config that this package has renamed."""
    own = dict.fromkeys(name for _, name in _names(plain, "") if name.startswith("loraplus_hydra."))
    return [name for name in own if not _exists(name)]


def _exists(name: str) -> bool:
    try:
        locate(name)
    except UserError as error:
        return isinstance(error.__cause__, ImportError)  # it exists, and lacks a package of its own
    return True


def _names(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (key, dotted path) of everything that would be imported for the config."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        inside = f"{path}.{key}" if path else str(key)
        if isinstance(value, (dict, list)):
            yield from _names(value, inside)
        elif isinstance(value, str) and key in _IMPORTED:
            yield inside, value
        elif isinstance(value, str) and inside in _LOCATIONS and value.startswith(PACKAGE_SCHEME):
            yield inside, value.removeprefix(PACKAGE_SCHEME).partition("/")[0]


def _sources(name: str, folder: Path) -> Iterator[Path]:
    """Yield the files and folders of each part of a dotted path, from the first part on.

    The search ends at the first part inside `folder`, because Python imports a part to find the next.
    """
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:count]))
        except (ImportError, ValueError, AttributeError):  # the part is a class, or doesn't exist
            return
        if spec is None:
            return
        found = [Path(spec.origin)] if spec.has_location and spec.origin else []
        found += [Path(place) for place in spec.submodule_search_locations or ()]
        yield from found
        if any(_inside(source, folder) for source in found):
            return


def _inside(source: Path, folder: Path) -> bool:
    return source.resolve().is_relative_to(folder)
