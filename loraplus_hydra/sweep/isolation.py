"""Isolation of the jobs in one process: each one starts as in a fresh process.

Around each job, `process_state` restores the state of the process and `library_state` resets the libraries.
"""

from __future__ import annotations

import gc
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from omegaconf import DictConfig

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.io.quiet_libraries import quiet_libraries
from loraplus_hydra.sweep.library_state import reset_libraries
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
        stack.callback(reset_libraries)
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
