"""The states of the random number generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states() -> tuple[Any, ...]:
    """Return the states of Python's, numpy's and torch's generators."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpus


def set_random_states(states: tuple[Any, ...]) -> None:
    """Restore the states that `random_states` returned."""
    python, numpy, cpu, on_gpus = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if on_gpus is not None:
        torch.cuda.set_rng_state_all(on_gpus)
