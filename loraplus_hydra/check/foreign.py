"""Names in a stored run's config that must not be followed.

These are code in the run's own folder, and dotted paths that moved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraplus_hydra.config.locations import PACKAGE_SCHEME
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import Problem, UserError

# Keys whose value is a dotted path that is imported, and those whose value may name a package's folder.
_IMPORTED = ("_target_", "args_class", "auto_class", "examples")
_LOCATIONS = ("model.path", "model.tokenizer")


def foreign_code(plain: Any, folder: Path) -> list[Problem]:
    """Return a Problem for each name in a plain config that leads to code inside `folder`."""
    place = folder.resolve()
    return [
        Problem(key, f"'{name}' is code in the run's own folder", "a run's folder brings none: name what is installed")
        for key, name in _names(plain, "")
        if any(_inside(source, place) for source in _sources(name, place))
    ]


def moved_paths(plain: Any) -> list[str]:
    """Return the names in a plain config that this package had before its first release."""
    own = dict.fromkeys(name for _, name in _names(plain, "") if name.startswith("loraplus_hydra."))
    return [name for name in own if not _exists(name)]


def _exists(name: str) -> bool:
    try:
        locate(name)
    except UserError:
        return False
    return True


def _names(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (key, dotted name) of everything in the config that would be imported."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        inside = f"{path}.{key}" if path else str(key)
        if isinstance(value, (dict, list)):
            yield from _names(value, inside)
        elif isinstance(value, str) and key in _IMPORTED:
            yield inside, value
        elif isinstance(value, str) and inside in _LOCATIONS and value.startswith(PACKAGE_SCHEME):
            yield inside, value.removeprefix(PACKAGE_SCHEME).partition("/")[0]


def _sources(name: str, folder: Path) -> Iterator[Path]:
    """Yield the files and folders of each part of a dotted name, the outer parts first.

    Ends at the first part inside `folder`: Python imports a part to look for those inside it.
    """
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:count]))
        except (ImportError, ValueError, AttributeError):  # a class, or nothing at all
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
