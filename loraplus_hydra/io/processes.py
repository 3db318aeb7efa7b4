"""Rank, size and shared folder of a run's processes (torchrun, accelerate launch)."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from loraplus_hydra.errors import UserError


def rank() -> int:
    """Return this process's rank: 0 for the first process, or for a single process."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of the run's processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return True if this is the process that prints and writes files for the run."""
    return rank() == 0


def hydra_arguments() -> list[str]:
    """Return overrides that stop Hydra from writing files; none for the first rank."""
    if is_main():
        return []
    folder = tempfile.mkdtemp(prefix=f"loraplus_hydra_rank{rank()}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]


def refuse_sweep(arguments: list[str]) -> None:
    """Raise UserError for a sweep under torchrun."""
    if world_size() > 1 and {"-m", "--multirun"} & set(arguments):
        raise UserError(
            "--multirun under torchrun would run the whole sweep in each process. Start the sweep without torchrun, "
            "with one device for each job, or start torchrun once for each job"
        )


def shared_folder(folder: Path) -> Path:
    """Return the first process's `folder` in every process."""
    if world_size() == 1:
        return folder
    import torch  # takes seconds, and only several processes need it
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())  # connects the processes, which the Trainer would do later
    paths = [str(folder.absolute())]
    broadcast_object_list(paths)
    return Path(paths[0])
