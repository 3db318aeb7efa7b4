"""Pairs of lora_A and lora_B, for optimizers that update one by the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_of
from loraplus_hydra.loraplus.grouping import FROM_THE_BASE_MODEL
from loraplus_hydra.loraplus.roles import tensor_records

# Roles of the tensors that LoRA-FA can train: those of plain LoRA, and those outside the adapter
_COVERED = FROM_THE_BASE_MODEL | {"lora_A", "lora_B", "lora_B_bias"}


NEEDS_WHOLE = "needs whole tensors, which DeepSpeed and FSDP split; use trainer=default or ddp, or optimizer=adamw"


@dataclass(frozen=True, eq=False)
class Pair:
    """The two matrices of a linear layer's LoRA update, `scaling` x B A."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


class PairedOptimizer(Optimizer):
    """An optimizer that needs the pairs of lora_A and lora_B.

    `build_optimizer` sets `pairs`. The optimizer updates every other tensor like its base class.
    """

    pairs: Sequence[Pair] | None = None
    trains_a: ClassVar[bool] = True

    def known_pairs(self) -> Sequence[Pair]:
        """Return the pairs. Raises UserError if they were not set."""
        if self.pairs is None:
            raise UserError(
                f"{type(self).__name__} needs the pairs of lora_A and lora_B: build it with create_loraplus_optimizer, "
                "or set its `pairs` to factor_pairs(model)"
            )
        return self.pairs


def factor_pairs(model: nn.Module) -> list[Pair]:
    """Return the pairs of LoRA on linear layers whose lora_B is trained."""
    from peft.tuners.adalora import AdaLoraLayer  # takes seconds, and importing this module should not
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    # AdaLoRA's update has a third factor, and a ParamWrapper's factors hold those of several experts.
    return [
        Pair(one.weight, module.lora_B[name].weight, float(module.scaling[name]))
        for module in model.modules()
        if isinstance(module, LoraLayer) and not isinstance(module, (AdaLoraLayer, ParamWrapper))
        for name, one in module.lora_A.items()
        if module.lora_B[name].weight.requires_grad and one.weight.ndim == 2
    ]


def trains_a(optimizer_cls: type[Optimizer]) -> bool:
    """Return False for a class that leaves lora_A as it is."""
    return not issubclass(optimizer_cls, PairedOptimizer) or optimizer_cls.trains_a


def freeze_untrained(optimizer_cls: type[Optimizer], model: nn.Module) -> None:
    """Freeze each lora_A if `optimizer_cls` trains none.

    Raises ConfigErrors for an adapter that the class can't train.
    """
    if not issubclass(optimizer_cls, PairedOptimizer):
        return
    pairs, name = factor_pairs(model), optimizer_cls.__name__
    if not pairs:
        raise _refused(f"{name} needs LoRA on linear layers, which this model doesn't have", "use optimizer=adamw")
    if trains_a(optimizer_cls):
        return
    records = tensor_records(model)
    others = [record.name for record in records if record.adapter is not None and record.role not in _COVERED]
    matrices = [record.name for record in records if record.role == "lora_B"]
    if others or len(matrices) != len(pairs):
        raise _refused(
            f"{name} can only train plain LoRA on linear layers, without DoRA, embeddings, convolutions or fused "
            f"experts, but the adapter has {first_of(others or matrices, 1)}",
            "use optimizer=adamw, or another adapter",
        )
    if any(_is_zero(pair.a) for pair in pairs) or any(
        record.starts_at_zero for record in records if record.role == "lora_A"
    ):
        raise _refused(
            f"{name} doesn't train lora_A, which starts at zero here, so lora_B would get no gradient either",
            "use adapter=lora, where lora_B starts at zero",
        )
    for pair in pairs:
        pair.a.requires_grad_(False)


def _is_zero(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and not bool(tensor.detach().any())


def _refused(what: str, fix: str) -> ConfigErrors:
    return ConfigErrors([Problem("optimizer", what, fix)])
