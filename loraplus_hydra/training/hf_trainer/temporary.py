"""A Trainer that leaves no trace in the process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState

from loraplus_hydra.training.process_state import process_state


@contextmanager
def temporary_state() -> Iterator[None]:
    """Restore the process state, and accelerate's, when the block ends.

    Warnings inside the block are not shown.
    """
    is_first = not AcceleratorState._shared_state
    with process_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if is_first:  # otherwise the run would keep the block's precision
                AcceleratorState._reset_state()
