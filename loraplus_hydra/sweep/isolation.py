"""Isolation of the jobs in one process: each job starts as in a fresh process."""

from __future__ import annotations

import gc
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.io.quiet_libraries import quiet_libraries
from loraplus_hydra.training.process_state import import_early, process_state


@contextmanager
def isolated(config: DictConfig) -> Iterator[None]:
    """Undo a job's changes to the process when the block ends, and free the job's memory."""
    quiet_libraries()
    import_early(config)
    with ExitStack() as stack:
        stack.callback(free_memory)
        stack.callback(_reset_libraries)
        stack.enter_context(process_state())
        stack.enter_context(warnings.catch_warnings())
        yield


def release_frames(error: BaseException) -> None:
    """Free the objects in the frames of `error`: the failed job's model, optimizer and data."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    free_memory()


def free_memory() -> None:
    """Collect garbage, and release torch's cached GPU memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _reset_libraries() -> None:
    """Reset the process-wide state of all imported libraries."""
    loaded: Any = sys.modules.get
    if accelerate := loaded("accelerate.state"):
        # It stores the first job's device and precision, and the position in gradient accumulation.
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()
    if bitsandbytes := loaded("bitsandbytes.optim.optimizer"):
        # It stores overrides by a parameter's id(), and a tensor of the next job may get the same id().
        bitsandbytes.GlobalOptimManager._instance = None
    if dynamo := loaded("torch._dynamo"):
        dynamo.reset()  # compiled code has references to the job's model
    # Otherwise the next job would log into runs that a failed job left open.
    if (wandb := loaded("wandb")) and getattr(wandb, "run", None) is not None:
        wandb.finish()
    if (mlflow := loaded("mlflow")) and mlflow.active_run() is not None:
        mlflow.end_run()
