"""A lock on a folder, without a lock file."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import processes

_TURN = 0.1  # seconds between two attempts to lock
_held: set[int] = set()  # file descriptors of the folders that this process has locked


@contextmanager
def folder_lock(
    folder: Path, *, use: str = "a run is active", key: str = "hydra.run.dir", patience: float = _TURN
) -> Iterator[bool]:
    """Lock `folder` against other processes. Raise UserError if another process has locked it.

    The error contains `use` (the reason for the lock) and `key` (the config's key that sets `folder`), and is raised
    after `patience` seconds. The default outlasts a process that only asks `is_locked`. Yields False if nothing is
    locked: on a file system without locks, and in all processes of a run except the first.
    """
    if not processes.is_main():
        yield False
        return
    # The operating system's lock on the folder itself. Unlike a lock file, it ends with a killed process.
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _held.add(handle)
    try:
        try:
            is_locked = lock(handle, time.monotonic() + patience)
        except BlockingIOError:
            raise UserError(f"{use} in {folder}; wait until it ends, or name another {key}") from None
        if not _is_still(handle, folder):  # replaced before the lock was taken
            raise UserError(f"{folder} was replaced by another process; give the command again")
        yield is_locked
    finally:
        if handle in _held:  # a forked process has already released the lock
            _held.remove(handle)
            os.close(handle)


def lock(handle: int, deadline: float = 0.0) -> bool:
    """Lock an open file until it is closed. Return False on a file system without locks.

    Raises BlockingIOError if another process still has the lock at the `deadline` (in the time of `time.monotonic`).
    """
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_TURN)
        except OSError:  # the file system has no locks; the run continues without protection
            return False
        else:
            return True


def is_locked(folder: Path) -> bool | None:
    """Return True if `folder` is locked, or None if this is unknown: on a file system without locks."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # it has been removed, or can't be read
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, and released at once
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def _is_still(handle: int, folder: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), folder.stat())
    return False


def _give_up_locks() -> None:
    while _held:
        os.close(_held.pop())


# A lock lasts as long as any process has its descriptor open, and DataLoader workers live for some seconds after a run
# is killed.
os.register_at_fork(after_in_child=_give_up_locks)
