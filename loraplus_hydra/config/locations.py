"""Locations of the package's own folders and of models."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from pathlib import Path

from loraplus_hydra.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGE_SCHEME = "pkg://"


def config_folder() -> Path:
    """Return the folder of YAML files. In a checkout it is a link out of the package."""
    return (PACKAGE / "conf").resolve()


def options_of(group: str) -> list[str]:
    """Return the names of a group's options, sorted."""
    return sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))


def expanded(path: str | Path) -> Path:
    """Return `path` with `~` expanded. For an unknown user it stays as it is, so it doesn't exist."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises RuntimeError for an unknown user


def model_location(path: str) -> str:
    """Return a model's `path` in the form that transformers accepts.

    `pkg://package/folder` becomes the path of that folder. A local folder becomes an absolute path, because an adapter
    stores the path of its base. A hub name stays unchanged. Raises UserError for a package that doesn't exist.
    """
    if not path.startswith(PACKAGE_SCHEME):
        local = expanded(path)
        return str(local.absolute()) if path.startswith("~") or os.path.exists(local) else path  # noqa: PTH110
    package, _, inside = path.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        if package.split(".")[0] in sys.stdlib_module_names:  # importing `this` or `antigravity` has effects
            raise ValueError("this package is part of Python itself")
        return str(files(package).joinpath(inside))
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' is not a folder of an installed Python package: {error}") from error


def is_local(location: str) -> bool:
    """Return True for a local folder (it exists, or looks like a path), False for a hub name."""
    looks_like_path = location.startswith((".", "/", "~", os.sep)) or location.count("/") > 1
    return looks_like_path or os.path.exists(location)  # noqa: PTH110 - False for names that are too long
