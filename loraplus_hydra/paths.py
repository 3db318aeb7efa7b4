"""Names of the files and folders that a run writes, and where the package's own folders lie."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

# A run's folder. The names are an interface: change one only with a line in the CHANGELOG.
CONFIG = "config.yaml"
PARAM_GROUPS = "param_groups.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
FIGURE = "train.png"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
HYDRA = ".hydra"

PACKAGE = Path(__file__).resolve().parent
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


def unfinished(path: Path) -> Path:
    """Where something is written before it takes the name `path`: the same folder, so that the rename is atomic."""
    return path.with_name(f".{path.name}.unfinished")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all: to a file beside it, then renamed over it."""
    draft = unfinished(path)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def replace_folder(draft: Path, folder: Path) -> None:
    """Give `draft`, a finished folder, the name `folder`, in place of what has it; that is removed afterwards."""
    if not folder.exists():
        draft.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def refuse_used_folder(folder: Path, key: str) -> None:
    """Raise UserError when `folder`, set by `key`, can't become a run's folder: a file, or not empty."""
    from loraplus_hydra.errors import UserError

    try:
        folder.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # too long a name, or none of a file system
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key}: {str(folder)[:200]!r} can't be a folder: {reason}; name another") from error
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key}: {folder} is a file; name a folder that is new or empty")
    if folder.is_dir() and any(folder.iterdir()):
        go_on = ""
        if (folder / HYDRA).is_dir():
            go_on = f"; to go on with the run in it: python -m loraplus_hydra resume {shlex.quote(str(folder))}"
        raise UserError(f"{key}: {folder} isn't empty; a run never writes over another, so name a new folder{go_on}")


def new_file(path: str, key: str) -> Path:
    """The file at `path`, set by `key`, which isn't there yet. Raises UserError when it is, or its folder isn't."""
    from loraplus_hydra.errors import UserError

    file = Path(path).expanduser()
    if file.exists():
        raise UserError(f"{key}: {file} is there already; name a new file")
    if not file.parent.is_dir():
        raise UserError(f"{key}: there is no folder {file.parent}; name a file in a folder that is there")
    return file
