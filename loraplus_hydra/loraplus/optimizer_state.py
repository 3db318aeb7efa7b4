"""32-bit state for trained embeddings under bitsandbytes' 8-bit optimizers, without its process-wide singleton.

`GlobalOptimManager` holds overrides by (group index, position), for every optimizer of the process: those of one job
reach the first tensors of the next, and the modules registered with it stay alive. So each optimizer gets a manager
of its own here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer


def keep_32bit_state(optimizer: Optimizer, names: Iterable[str]) -> None:
    """Give a bitsandbytes optimizer its own manager, with 32-bit state for the tensors `names` of its `param_names`.

    Any other optimizer is left as it is. Call it before the first step. Overrides registered with bitsandbytes' global
    manager don't reach the optimizer any more.
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
    """Whether this optimizer (or class) is built on bitsandbytes' base class, all of whose kinds read a manager."""
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.optim.optimizer import Optimizer8bit

    return issubclass(optimizer if isinstance(optimizer, type) else type(optimizer), Optimizer8bit)
