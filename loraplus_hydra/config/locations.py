"""Locations of the package's own folders and of models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


PACKAGE_SCHEME = "pkg://"


def config_folder() -> Path:
    """The folder of YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


def model_location(path: str) -> str:
    """A model's `path` as transformers takes it: `pkg://package/folder` becomes that package's folder, all else stays.

    A relative folder is left relative: it starts where the command was given. Raises UserError for a package that isn't
    there.
    """
    if not path.startswith(PACKAGE_SCHEME):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    package, _, inside = path.removeprefix(PACKAGE_SCHEME).partition("/")
    from importlib.resources import files

    from loraplus_hydra.errors import UserError

    try:
        if package.split(".")[0] in sys.stdlib_module_names:  # some do things on import
            raise ValueError("it is part of Python itself")
        return str(files(package).joinpath(inside))
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' names no folder of a package here: {error}") from error


def is_local(location: str) -> bool:
    """Whether `location` is meant as a folder here (it exists, or is spelt like a path), not as a name on a hub."""
    looks_like_path = location.startswith((".", "/", "~", os.sep)) or location.count("/") > 1
    return looks_like_path or Path(location).exists()
