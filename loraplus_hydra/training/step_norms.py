"""For each group, the norm of its weights after a step and the norm of its update.

Learning is efficient in the sense of LoRA+ (arXiv 2402.12354, section 3) if the updates of both A and B change the
model's features. Plain LoRA with one rate changes B too little. The norms of the groups' updates show this.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import distributed
from torch.nn.utils import get_total_norm
from transformers.trainer_utils import IntervalStrategy

Norms = dict[str, dict[str, float]]


def may_be_logged(args: Any, state: Any, train_dataloader: Any) -> bool:
    """Return True if the Trainer may log the next step.

    With `logging_strategy=epoch`, an epoch may also end early, because an evaluation can stop training.
    """
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return bool(step % state.logging_steps == 0)
    if args.logging_strategy != IntervalStrategy.EPOCH:
        return False
    try:
        batches = len(train_dataloader)
    except TypeError:  # streamed rows, whose last step is unknown
        return True
    steps_of_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    evaluated = args.eval_strategy == IntervalStrategy.STEPS and step % state.eval_steps == 0
    return bool(step % steps_of_epoch == 0 or step >= state.max_steps or evaluated)


class StepNorms:
    """Norms for one optimizer step. Make the object before the step, and call `norms()` after it.

    The object copies the trained tensors (in at least 32 bits). It changes nothing and draws no random numbers.
    """

    def __init__(self, optimizer: Any, model: Any) -> None:
        self._groups = {group["name"]: list(group["params"]) for group in optimizer.param_groups}
        self._shards = _process_group(model)
        self._before = {name: [_copied(one) for one in tensors] for name, tensors in self._groups.items()}

    def norms(self) -> Norms:
        """Return for each group the L2 norm of its tensors ("weight") and of their change ("update").

        For sharded tensors, the norm is over all shards, and every process must call this method. Call it only once,
        because it overwrites the copies with differences.
        """
        norms: Norms = {}
        with torch.no_grad():
            for name, tensors in self._groups.items():
                changes = [old.neg_().add_(new) for old, new in zip(self._before.pop(name), tensors, strict=True)]
                norms[name] = {"weight": self._norm(tensors), "update": self._norm(changes)}
        return norms

    def _norm(self, tensors: list[torch.Tensor]) -> float:
        # DTensors of different meshes, or DTensors and plain tensors, can't be combined
        by_mesh: dict[Any, list[torch.Tensor]] = {}
        for tensor in tensors:
            wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
            by_mesh.setdefault(getattr(tensor, "device_mesh", None), []).append(wide)
        square = sum(float(_whole(get_total_norm(part))) ** 2 for part in by_mesh.values())
        if self._shards is not None:
            of_all = torch.tensor(square, dtype=torch.float64, device=tensors[0].device)
            distributed.all_reduce(of_all, group=self._shards)
            square = float(of_all)
        return math.sqrt(square)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """Return a norm over all shards."""
    from torch.distributed.tensor import DTensor

    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _process_group(model: Any) -> Any:
    """Return the processes that share FSDP1's flat parameters; None without FSDP1."""
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    for module in FullyShardedDataParallel.fsdp_modules(model):
        return None if module.sharding_strategy is ShardingStrategy.NO_SHARD else module.process_group
    return None
