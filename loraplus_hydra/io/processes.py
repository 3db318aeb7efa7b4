"""Several processes of one run (torchrun, accelerate launch): which one speaks and writes, and what all agree on."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplus_hydra.errors import UserError

_locked: set[int] = set()  # file descriptors by which this process holds folders: see `alone_in`


def rank() -> int:
    """This process's place among those of the run, 0 for the first and for a process that is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process speaks and writes for the run."""
    return rank() == 0


def hydra_arguments() -> list[str]:
    """Overrides for the processes that write nothing: a temporary folder for Hydra, no `.hydra`."""
    if is_main():
        return []
    folder = tempfile.mkdtemp(prefix=f"loraplus_hydra_rank{rank()}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]


def refuse_sweep(arguments: list[str]) -> None:
    """Raise UserError for a sweep inside torchrun, where every process would run the whole of it."""
    if world_size() > 1 and {"-m", "--multirun"} & set(arguments):
        raise UserError(
            "--multirun under torchrun would run the whole sweep in each process. Start the sweep plainly and let each "
            "job use one device, or start torchrun once for each job"
        )


def agree_on(folder: Path) -> Path:
    """The first process's folder, in every process."""
    if world_size() == 1:
        return folder
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=_on_cpu())
    told = [str(folder.absolute())]
    broadcast_object_list(told)
    return Path(told[0])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse, with a UserError, a folder in which another run is at work; inside, others are refused.

    The lock is the operating system's own, so that a killed run leaves none behind. It lasts as long as any process has
    its descriptor, so forked ones (a DataLoader's workers, which outlive a killed run by seconds) give theirs up.
    """
    if not is_main():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _locked.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"a run is at work in {folder}; wait for it, or name another hydra.run.dir") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        if handle in _locked:  # not in a forked process that comes by here
            _locked.remove(handle)
            os.close(handle)


def _give_up_locks() -> None:
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_give_up_locks)


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()
