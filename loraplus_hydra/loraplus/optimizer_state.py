"""32-bit state for trained embeddings under bitsandbytes' 8-bit optimizers.

bitsandbytes' `GlobalOptimManager` is a singleton whose overrides go by (group index, position). One job's overrides
reach the first tensors of the next job, and modules registered with it stay alive. So each optimizer gets a manager of
its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer


def keep_32bit_state(optimizer: Optimizer, names: Iterable[str]) -> None:
    """Make a bitsandbytes optimizer keep 32-bit state for the tensors `names`.

    Other optimizers are left unchanged. The names are those in the groups' `param_names`. Call it before the first
    step. Overrides in bitsandbytes' global manager no longer reach the optimizer.
    """
    if not is_bitsandbytes(optimizer):
        return
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    wanted = frozenset(names)
    manager: Any = GlobalOptimManager.__new__(GlobalOptimManager)  # its __init__ refuses: there is to be one only
    manager.initialize()
    # By position: a tensor's id changes when a trainer moves, shards or replaces it, its place in the groups doesn't.
    manager.index2config = {
        (group_index, position): {"optim_bits": 32}
        for group_index, group in enumerate(optimizer.param_groups)
        for position, name in enumerate(group["param_names"])
        if name in wanted
    }
    optimizer.mng = manager  # type: ignore[attr-defined]


def is_bitsandbytes(optimizer: Optimizer | type) -> bool:
    """Return True if the optimizer or class derives from bitsandbytes' base class, which reads a manager."""
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.optim.optimizer import Optimizer8bit

    return issubclass(optimizer if isinstance(optimizer, type) else type(optimizer), Optimizer8bit)
