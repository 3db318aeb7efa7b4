"""One GPU for each worker where several jobs run on one machine.

SLURM and Ray hand GPUs out themselves. Other launchers start processes that all see every GPU, and the Trainer would
take all of them for each job.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

_NOT_HANDING_OUT = ("hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "submitit_launcher.LocalLauncher")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_MOST_ON_ONE = 64  # processes
_held: list[FileLock] = []  # the lock on this process's GPU, kept until the process ends


def take_one(hydra: Any) -> str | None:
    """Let this process see one GPU alone, the least used by other sweeps' workers, and return its name.

    For `hydra`, Hydra's node of a job, whose launcher starts several jobs on one machine and hands out no GPUs; else
    None, and also where there are no two GPUs to choose from. A process keeps its GPU until it ends: once used, no
    other can be given to it.
    """
    if _held or not str(hydra.launcher.get("_target_")).endswith(_NOT_HANDING_OUT):
        return None
    names = visible()
    if len(names) < 2:
        return None
    folder = Path(tempfile.gettempdir()) / f"loraplus_hydra_gpus_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for turn in range(_MOST_ON_ONE):  # a second process on a GPU only when each has one
        for name in names:
            lock = FileLock(folder / f"{name.replace(os.sep, '-')}.{turn}", timeout=0)
            with suppress(OSError, NotImplementedError):  # another worker has it, or the file system has no locks
                lock.acquire()
                _held.append(lock)
                os.environ[_VISIBLE] = name
                return name
    return None


def visible() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; none once it has begun to use them."""
    import torch

    if torch.cuda.is_initialized():
        return []
    count = torch.cuda.device_count()
    if os.environ.get(_VISIBLE):
        return [name.strip() for name in os.environ[_VISIBLE].split(",")][:count]
    return [str(index) for index in range(count)]
