"""Atomic writes, and checks that a path can be written before a run starts."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io.run_folder import HYDRA


def unfinished(path: Path) -> Path:
    """Return the path under which to write something before it is renamed to `path`."""
    return path.with_name(f".{path.name}.unfinished")  # in the same folder: only there is a rename atomic


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: a reader sees the old file or the new one."""
    draft = unfinished(path)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
    draft.replace(path)


def replace_folder(draft: Path, folder: Path) -> None:
    """Rename the finished folder `draft` to `folder`, and remove what had that name."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():  # a rename can't replace a folder that has files
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def refuse_used_folder(folder: Path, key: str) -> None:
    """Raise UserError unless `folder`, set by `key`, is new or empty."""
    try:
        folder.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a name that is too long, or not valid for the file system
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key}: {str(folder)[:200]!r} can't be a folder: {reason}; name another") from error
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{key}: {folder} is a file; name a folder that is new or empty")
    if folder.is_dir() and any(folder.iterdir()):
        hint = ""
        if (folder / HYDRA).is_dir():
            hint = f"; to resume the run in it: python -m loraplus_hydra resume {shlex.quote(str(folder))}"
        raise UserError(f"{key}: {folder} isn't empty; a run never overwrites another, so name a new folder{hint}")


def new_file(path: str, key: str) -> Path:
    """Return `path`, set by `key`, with `~` expanded.

    Raises UserError when the file exists already, or its folder doesn't.
    """
    file = Path(path).expanduser()
    if file.exists():
        raise UserError(f"{key}: {file} exists already; name a new file")
    if not file.parent.is_dir():
        raise UserError(f"{key}: there is no folder {file.parent}; name a file in a folder that exists")
    return file


def refuse_unwritable(folder: Path, key: str) -> None:
    """Raise ConfigErrors when `folder`, set by `key`, can't be made or written into."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigErrors([Problem(key, f"{place} is a file, so there can be no {folder}", "name another folder")])
    try:  # permissions alone don't show /proc or a full quota, and mean nothing to root
        Path(tempfile.mkdtemp(prefix=".writable-", dir=place)).rmdir()
    except OSError as error:
        what = f"{place} can't be written into: {error.strerror}"
        raise ConfigErrors([Problem(key, what, "name a folder that can")]) from None
