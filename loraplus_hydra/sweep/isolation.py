"""Isolation of the jobs in one process: each one starts as in a fresh process."""

from __future__ import annotations

import gc
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.io.quiet_libraries import quiet_libraries
from loraplus_hydra.training.measure import reset_peak_memory
from loraplus_hydra.training.process_state import process_state


@contextmanager
def isolated(config: DictConfig) -> Iterator[None]:
    """Undo, after a job with `config`, its changes to the process, and free its memory."""
    quiet_libraries()
    _import_early(config)
    reset_peak_memory()
    with ExitStack() as stack:
        stack.callback(free_memory)
        stack.callback(_reset_libraries)
        stack.enter_context(process_state())
        stack.enter_context(warnings.catch_warnings())
        yield


def release_frames(error: BaseException) -> None:
    """Free what the frames of `error` hold: the failed job's model, optimizer and data."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    free_memory()


def free_memory() -> None:
    """Collect garbage in cycles, and return torch's cached GPU memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _reset_libraries() -> None:
    """Reset the state that libraries keep for the whole process, of those that have been imported."""
    loaded: Any = sys.modules.get
    if accelerate := loaded("accelerate.state"):
        # It keeps the first job's device and precision, and accumulates gradients where that one stopped.
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()
    if bitsandbytes := loaded("bitsandbytes.optim.optimizer"):
        # It keeps overrides by a parameter's id(), which a tensor of the next job may get again.
        bitsandbytes.GlobalOptimManager._instance = None
    if dynamo := loaded("torch._dynamo"):
        dynamo.reset()  # compiled code keeps the job's model alive
    # The next job would log into the runs that a failed one left open.
    if (wandb := loaded("wandb")) and getattr(wandb, "run", None) is not None:
        wandb.finish()
    if (mlflow := loaded("mlflow")) and mlflow.active_run() is not None:
        mlflow.end_run()


def _import_early(config: DictConfig) -> None:
    """Import the libraries that the job needs, before the state of the process is saved."""
    # What an import sets once for the process must stay.
    import datasets  # noqa: F401
    import peft  # noqa: F401

    # Otherwise the first rows and the first model import these two, which set environment variables.
    import scipy.io  # noqa: F401
    import transformers.generation.utils
    import transformers.trainer  # noqa: F401

    for group in ("task", "optimizer", "scheduler", "adapter", "data"):
        with suppress(UserError, AttributeError, TypeError):  # the check reports wrong names
            locate(config[group]._target_)
