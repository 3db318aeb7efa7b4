"""Several processes of one run (torchrun, accelerate launch): which one speaks and writes, and what all agree on."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from loraplus_hydra.errors import UserError


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


def shared_folder(folder: Path) -> Path:
    """The first process's folder, in every process."""
    if world_size() == 1:
        return folder
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=_on_cpu())
    told = [str(folder.absolute())]
    broadcast_object_list(told)
    return Path(told[0])


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()
