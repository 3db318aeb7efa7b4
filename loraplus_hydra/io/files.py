"""Names of the files and folders that a run writes, and where the package's own folders lie."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io.run_folder import HYDRA


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


def refuse_unwritable(folder: Path, key: str) -> None:
    """Raise ConfigErrors when `folder`, set by `key`, can't be made or written into."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigErrors([Problem(key, f"{place} is a file, so there can be no {folder}", "name another folder")])
    try:  # asked of the file system itself: permissions say nothing of /proc, of a full quota, or to root
        Path(tempfile.mkdtemp(prefix=".writable-", dir=place)).rmdir()
    except OSError as error:
        what = f"{place} can't be written into: {error.strerror}"
        raise ConfigErrors([Problem(key, what, "name a folder that can")]) from None
