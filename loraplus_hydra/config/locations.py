"""Locations of the package's own folders and of models."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from loraplus_hydra.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGE_SCHEME = "pkg://"


def config_folder() -> Path:
    """Return the folder of YAML files: inside the installed package, or beside it in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


def model_location(path: str) -> str:
    """Return a model's `path` as transformers takes it.

    `pkg://package/folder` becomes that package's folder, and a local folder its absolute path, which an adapter stores
    as its base. A name on a hub stays unchanged. Raises UserError for a package that doesn't exist.
    """
    if not path.startswith(PACKAGE_SCHEME):
        expanded = Path(path).expanduser()
        return str(expanded.absolute()) if path.startswith("~") or expanded.exists() else path
    package, _, inside = path.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        if package.split(".")[0] in sys.stdlib_module_names:  # importing `this` or `antigravity` has effects
            raise ValueError("it is part of Python itself")
        return str(files(package).joinpath(inside))
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' is no folder of an installed Python package: {error}") from error


# Keys whose value can be a local path. A run stores it as absolute, so that the run can be opened from another folder.
PATH_KEYS = ("model.path", "model.tokenizer", "adapter.path", "data.train", "data.eval")


def absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the absolute path for each key of PATH_KEYS whose value in `values` is relative and exists.

    `values` maps dotted keys to values; a value may be a list of paths.
    """
    found = {key: _absolute(values[key]) for key in PATH_KEYS if key in values}
    return {key: value for key, value in found.items() if value != values[key]}


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    try:
        exists = isinstance(value, str) and value != "" and Path(value).exists()
    except (OSError, ValueError):  # no path at all
        exists = False
    return str(Path(value).absolute()) if exists else value


def is_local(location: str) -> bool:
    """Return True for a local folder (it exists, or looks like a path), False for a name on a hub."""
    looks_like_path = location.startswith((".", "/", "~", os.sep)) or location.count("/") > 1
    return looks_like_path or Path(location).exists()
