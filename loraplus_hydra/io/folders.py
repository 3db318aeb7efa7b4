"""Folders that the program writes into.

This module makes, checks, replaces and removes folders, never through a link.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io.files import REMOVE, draft_of, drafts_in, found_at, is_hub_blob, refuse_dangling, refuse_link
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.run_folder import CONFIG, FOLDERS, HYDRA, WRITTEN

# Folders that other programs write, with links (`wandb/latest-run`). This program neither reads nor empties these
# folders.
_OTHERS = ("wandb", ".submitit")
_DEEPEST = 50  # levels of folders; at some hundred levels Python's own walks raise a RecursionError


def refuse_links(folder: Path, key: str, *, reading: bool = False) -> None:
    """Raise ConfigErrors at `key` if `folder` contains a link, device or pipe.

    More than 50 levels of folders are an error, too.

    The path to `folder` may have links. With `reading`, a hub cache's links to its own blobs are allowed.
    """
    waiting = [(folder, 1)] if folder.is_dir() else []
    while waiting:
        place, depth = waiting.pop()
        if depth > _DEEPEST:
            what = f"{folder} has more than {_DEEPEST} levels of folders; runs never write so many"
            raise ConfigErrors([Problem(key, what, "remove them")])
        with os.scandir(place) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting += [(path, depth + 1)] if entry.name not in _OTHERS else []
                elif not entry.is_file(follow_symlinks=False) and not (reading and is_hub_blob(path)):
                    kind = "is a link" if entry.is_symlink() else "is neither a file nor a folder"
                    raise ConfigErrors([Problem(key, f"{path} {kind}, which no run writes", REMOVE)])


def refuse_foreign(folder: Path, key: str) -> None:
    """Raise ConfigErrors at `key` if a run can't write into its folder.

    This is so for links, and for a folder in place of a file or the other way round.
    """
    refuse_links(folder, key)
    for name in (*WRITTEN, HYDRA, *(path.name for path in folder.glob("*.log"))):
        path, is_folder = folder / name, name in FOLDERS
        if path.exists() and path.is_dir() != is_folder:
            kinds = ("a folder", "a file")
            what = f"{path} is {kinds[is_folder]}, where a run has {kinds[not is_folder]}"
            raise ConfigErrors([Problem(key, what, REMOVE)])


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents if they don't exist."""
    folder.mkdir(parents=True, exist_ok=True)


def private_folder(name: str) -> Path:
    """Return this user's folder `name` in the system's temporary folder.

    Raises UserError if another user owns the folder, because that user could create links in it.
    """
    folder = Path(tempfile.gettempdir()) / name
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UserError(f"{folder} must be a folder that only you can write; remove it")
    return folder


def remove_folder(folder: Path) -> None:
    """Remove `folder` with all its files. If it is a link, only the link is removed."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)  # doesn't follow links inside the folder


def remove(path: Path) -> None:
    """Remove a file, a folder or a link if it exists. The target of a link is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(folder: Path, to: Path) -> None:
    """Rename `folder` to the unused name `to`. Raises UserError if `folder` is a link."""
    refuse_link(folder)
    folder.rename(to)


def remove_drafts(folder: Path) -> None:
    """Remove the drafts that killed processes left in `folder`. The caller must have locked it."""
    for draft in drafts_in(folder):
        remove(draft)


@contextmanager
def new_folder(target: Path, key: str) -> Iterator[Path]:
    """Yield a draft folder that is renamed to `target` when the block ends.

    `target` must be new or empty, and is locked until the block ends. After an error the draft is removed. `key` is the
    config's key that sets `target`. Raises UserError if `target` is used or another process writes it.
    """
    refuse_used_folder(target, key)
    target = target.resolve()  # `target` may be a link to a folder, but a rename can't replace a link
    made = _make_missing(target)
    try:
        with folder_lock(target, use="another process is active", key=key) as is_locked:
            for left in drafts_in(target.parent, target) if is_locked else ():
                remove(left)
            with _draft(target) as draft:
                yield draft
                _rename(draft, target, key)
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # another process uses it
                folder.rmdir()
        raise


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft folder that replaces `folder` when the block ends.

    Raises UserError for a link.
    """
    refuse_link(folder)
    with _draft(folder) as draft:
        yield draft
        if folder.exists():  # a rename can't replace a folder that has files
            old = draft_of(folder)
            folder.rename(old)
            draft.rename(folder)
            remove_folder(old)
        else:
            draft.rename(folder)


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of `source` into the existing folder `target`. `source` must not contain links."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def refuse_used_folder(folder: Path, key: str) -> None:
    """Raise UserError, with `key`, unless `folder` is new or empty."""
    if found_at(folder, key) is None:
        return
    refuse_dangling(folder, key)
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is a file; name a folder that is new or empty")
    if any(folder.iterdir()):
        hint = ""
        if (folder / HYDRA).is_dir() or (folder / CONFIG).is_file():  # a run started from Python has no .hydra
            hint = f"; to resume the run in it: python -m loraplus_hydra resume {shlex.quote(str(folder))}"
        raise UserError(f"{key}: {folder} isn't empty; a run never overwrites another, so name a new folder{hint}")


def _make_missing(target: Path) -> list[Path]:
    """Make `target` and its missing parents. Return the folders that were made, outermost first."""
    made = []
    for folder in reversed([target, *target.parents]):
        if folder.is_dir():
            continue
        with suppress(FileExistsError):  # another process has made it first
            folder.mkdir()
            made.append(folder)
    return made


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    draft = draft_of(target)
    draft.mkdir()
    try:
        yield draft
    finally:
        if draft.exists():  # after an error
            remove_folder(draft)


def _rename(draft: Path, target: Path, key: str) -> None:
    try:
        draft.rename(target)  # a rename may replace an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"{key}: {target} has been written by another process meanwhile; name a new folder") from None
