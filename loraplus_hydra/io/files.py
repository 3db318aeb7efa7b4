"""Writing of files: never through a link, and never under a predictable temporary name."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from loraplus_hydra.config.locations import expanded
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io.locks import lock

_DRAFT = re.compile(r"\.(.+)\.[0-9a-f]{16}\.unfinished")
_LONGEST = 255  # bytes; longest name of a file
# O_NONBLOCK, because opening a FIFO would wait for another process. The flag has no effect on regular files.
SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
REMOVE = "remove it, or put the file itself in its place"


def draft_of(path: Path) -> Path:
    """Return a random name, in the same folder, for a draft that is later renamed to `path`."""
    # In the same folder, because a rename is only atomic there. Random, so nobody can create a link with this name in
    # advance.
    return path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.unfinished")


def drafts_in(folder: Path, target: Path | None = None) -> list[Path]:
    """Return the drafts in `folder` that killed processes left. With `target`, only drafts of `target`."""
    named = [(path, _DRAFT.fullmatch(path.name)) for path in folder.iterdir()]
    return [path for path, match in named if match and (target is None or match[1] == _stem(target))]


def refuse_link(path: Path) -> None:
    """Raise UserError if `path` is a link."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, and nothing is written through a link; {REMOVE}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: a reader sees the old file or the new one.

    Raises UserError for a link.
    """
    refuse_link(path)
    draft = draft_of(path)
    try:
        with _create(draft) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # without it, a power cut after the rename could leave an empty file
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically. Raises UserError for a link."""
    # A file's name that isn't UTF-8 has lone surrogates. JSON and YAML have escapes such as \udce9 for them.
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_beside(path: Path, ending: str, text: str) -> Path:
    """Write `text` to a new file beside `path`, and return the file. No file is ever replaced.

    Its name is the name of `path` with `ending`. If that is taken, a number follows: `.part`, `.part2`, `.part3`.
    """
    for number in count(1):
        end = ending if number == 1 else f"{ending}{number}"
        file = path.with_name(_stem(path, _LONGEST - len(end)) + end)
        with suppress(FileExistsError), _create(file) as opened:
            opened.write(text.encode("utf-8"))
            return file
    raise AssertionError("there is always a next number")


def copy_file(source: Path, target: Path) -> None:
    """Copy the regular file `source` to the new file `target`. Raises OSError for a link."""
    place = source.resolve() if is_hub_blob(source) else source
    with os.fdopen(open_regular(place, os.O_RDONLY), "rb") as file, _create(target) as copy:
        shutil.copyfileobj(file, copy, 2**20)


def append_text(path: Path, text: str) -> None:
    """Append `text` to the file `path`, or create it. Raises UserError for a link."""
    refuse_link(path)
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "wb") as file:
        file.write(text.encode("utf-8"))


def truncate(path: Path, size: int) -> None:
    """Shorten the file `path` to `size` bytes. Raises UserError for a link."""
    refuse_link(path)
    with os.fdopen(open_regular(path, os.O_WRONLY), "wb") as file:
        file.truncate(size)


def remove(path: Path) -> None:
    """Remove the file `path` if it exists. If it is a link, only the link is removed."""
    path.unlink(missing_ok=True)


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file and return its descriptor. Raises OSError for a link, FIFO or device."""
    handle = os.open(path, flags | SAFE, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file")
    return handle


def is_hub_blob(path: Path) -> bool:
    """Return True if `path` is a link in a hub cache to a blob of the same repository."""
    if not path.is_symlink():  # nearly all files are not links, and this check is fast
        return False
    snapshots = next((folder for folder in path.absolute().parents if folder.name == "snapshots"), None)
    if snapshots is None or not path.is_file():
        return False
    return path.resolve().parent == (snapshots.parent / "blobs").resolve()


def found_at(path: Path, key: str, *, kind: str = "folder") -> os.stat_result | None:
    """Return the status of what is at `path`, a link's own; None if there is nothing.

    Raises ConfigErrors at `key` if nothing can be there: a name is too long, or not valid for the file system.
    """
    try:
        if any(len(os.fsencode(part)) > _LONGEST for part in path.parts):  # also below a folder that doesn't exist
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return path.lstat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        what = f"{str(path)[:200]!r} can't be a {kind}: {reason}"
        raise ConfigErrors([Problem(key, what, "name another")]) from error


def new_file(path: str, key: str) -> Path:
    """Return `path` with `~` expanded.

    Raises UserError, with `key`, if the file already exists and has content, or its folder doesn't exist.
    """
    file = expanded(path)
    found = found_at(file, key, kind="file")
    if found is not None and not (stat.S_ISREG(found.st_mode) and found.st_size == 0):
        raise UserError(f"{key}: {file} exists already; name a new file")
    if not file.parent.is_dir():
        raise UserError(f"{key}: there is no folder {file.parent}; name a file in a folder that exists")
    return file


@contextmanager
def reserved(path: str, key: str) -> Iterator[Path]:
    """Reserve a file's name: no other process can write the file until the block ends.

    The reservation is an empty file with this name, which `write_text` replaces. It is removed if nothing is written.
    `key` is the config's key that sets the name. Raises UserError if the file has content, can't be written, or is
    reserved by another process.
    """
    file = new_file(path, key)
    refuse_unwritable(file.parent, key)
    taken = UserError(f"{key}: another process writes {file}; name another file")
    handle = open_regular(file, os.O_RDWR | os.O_CREAT)
    try:
        try:
            lock(handle)
        except BlockingIOError:
            raise taken from None
        if not _is_at(handle, file) or os.fstat(handle).st_size:  # another process has written it since the check above
            raise taken
        try:
            yield file
        finally:
            if _is_at(handle, file):
                file.unlink()
    finally:
        os.close(handle)


def refuse_unwritable(folder: Path, key: str) -> None:
    """Raise ConfigErrors at `key` if `folder` can't be made or written."""
    place = folder.absolute()
    for path in reversed([place, *place.parents]):
        if found_at(path, key) is None:
            found_at(folder, key)  # a name below may be too long
            break
        refuse_dangling(path, key)
        if not path.is_dir():
            raise ConfigErrors([Problem(key, f"{path} is a file, so {folder} can't be made", "name another folder")])
        place = path
    try:  # a trial, because permissions don't reveal /proc or a full quota, and don't apply to root
        Path(tempfile.mkdtemp(prefix=".writable-", dir=place)).rmdir()
    except OSError as error:
        what = f"{place} can't be written: {error.strerror}"
        raise ConfigErrors([Problem(key, what, "name a writable folder")]) from None


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE, 0o666), "wb")


def _is_at(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.lstat())
    return False


def _stem(path: Path, room: int = _LONGEST - len("..0123456789abcdef.unfinished")) -> str:
    """Return a file's name, cut to `room` bytes. The default is the room in a draft's name."""
    return os.fsencode(path.name)[:room].decode("utf-8", errors="ignore")


def refuse_dangling(path: Path, key: str) -> None:
    """Raise ConfigErrors at `key` if `path` is a link to a target that doesn't exist."""
    if path.is_symlink() and not path.exists():
        raise ConfigErrors([Problem(key, f"{path} is a link to a target that doesn't exist", "name another folder")])
