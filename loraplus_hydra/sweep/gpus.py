"""One GPU for each worker of launchers that start several jobs on one machine.

SLURM and Ray assign GPUs themselves. With other launchers each process sees all GPUs, and the Trainer would use all
GPUs for each job.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from filelock import FileLock

from loraplus_hydra.io.folders import private_folder

_LAUNCHERS = ("hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "submitit_launcher.LocalLauncher")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_MOST_ON_ONE = 64  # maximum number of processes per GPU
_held: list[FileLock] = []  # the lock on this process's GPU, kept until the process ends


def claim_gpu(hydra: Any) -> str | None:
    """Make this process see only the GPU with the fewest workers, and return its name.

    `hydra` is the `hydra` node of a job's config. Returns None, and changes nothing, if the launcher assigns GPUs
    itself, or if there are fewer than two GPUs. A process keeps its GPU until it ends.
    """
    if _held or not str(hydra.launcher.get("_target_")).endswith(_LAUNCHERS):
        return None
    names = visible_gpus()
    if len(names) < 2:
        return None
    folder = private_folder(f"loraplus_hydra_gpus_{os.getuid()}")  # all sweeps of the user share this folder
    for turn in range(_MOST_ON_ONE):  # a GPU gets a second process only if every GPU has one
        for name in names:
            lock = FileLock(folder / f"{name.replace(os.sep, '-')}.{turn}", timeout=0)
            with suppress(OSError, NotImplementedError):  # another worker has the lock, or the file system has no locks
                lock.acquire()
                _held.append(lock)
                os.environ[_VISIBLE] = name
                return name
    return None


def visible_gpus() -> list[str]:
    """Return the visible GPUs, with the names of CUDA_VISIBLE_DEVICES."""
    import torch  # takes seconds, and most launchers don't need the answer

    if torch.cuda.is_initialized():  # torch has already read the variable
        return []
    count = torch.cuda.device_count()
    if os.environ.get(_VISIBLE):
        return [name.strip() for name in os.environ[_VISIBLE].split(",")][:count]
    return [str(index) for index in range(count)]
