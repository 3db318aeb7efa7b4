"""The adapter's whole tensors, of a model that DeepSpeed or FSDP has split among the processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME


def whole_tensors(trainer: Any) -> dict[str, torch.Tensor] | None:
    """Return the adapter's tensors by name, collected from all processes.

    None if each process has them whole. Every process must call it.
    """
    if trainer.is_deepspeed_enabled:
        if trainer.deepspeed.zero_optimization_stage() < 3:
            return None
        # As the Trainer does for a checkpoint
        collected: dict[str, torch.Tensor] = trainer.deepspeed._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=True
        )
        return collected
    if not trainer.is_fsdp_enabled:
        return None
    if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        return collect_shards(trainer.model)
    whole: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)  # FSDP 1
    return whole


def collect_shards(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's whole tensors by name, of a model that `fully_shard` has split."""
    return {
        name: parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or ADAPTER_NAME in name.split(".")
    }
