"""A lock on a folder, without a lock file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import processes

_held: set[int] = set()  # file descriptors of the folders that this process has locked


@contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Lock `folder` against other processes, and raise UserError when one of them holds it.

    Yields False where nothing is locked: on a file system without locks, and in all but a run's first process.
    """
    if not processes.is_main():
        yield False
        return
    # The operating system's lock on the folder itself: unlike a lock file, a killed run leaves nothing behind.
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        yield _lock(handle, folder)
    finally:
        if handle in _held:  # a forked process that leaves this block has given it up before
            _held.remove(handle)
            os.close(handle)


def _lock(handle: int, folder: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"a run is active in {folder}; wait for it, or name another hydra.run.dir") from None
    except OSError:  # the file system has no locks: running unprotected beats not running
        return False
    return True


def _give_up_locks() -> None:
    while _held:
        os.close(_held.pop())


# A lock lasts as long as any process has its descriptor open. DataLoader workers outlive a killed run by seconds.
os.register_at_fork(after_in_child=_give_up_locks)
