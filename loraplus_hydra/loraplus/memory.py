"""What weights, adapter, gradients and optimizer state take, from shapes alone. Activations are not in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loraplus_hydra.loraplus.plan import Placed

BLOCK_4BIT = 64  # numbers that share one scale in bitsandbytes' 4-bit weights
BLOCK_OF_SCALES = 256  # scales that share one scale again, with double quantisation


@dataclass(frozen=True)
class Memory:
    """Bytes. `optimizer` is None where the optimizer's state could not be measured."""

    weights: int  # frozen, as loaded
    adapter: int  # trained tensors
    gradients: int  # of those
    optimizer: int | None

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + (self.optimizer or 0)


def estimate(model: nn.Module, placed: Sequence[Placed], quantization: Mapping[str, Any] | None = None) -> Memory:
    """Memory of training `model` (the meta device will do) with the tensors of `placed` trained.

    `quantization` holds BitsAndBytesConfig's `load_in_4bit`, `load_in_8bit` and `bnb_4bit_use_double_quant`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in trained.values())
    states = [one.state_bytes for one in placed]
    return Memory(
        weights=_frozen_bytes(model, quantization or {}),
        adapter=adapter,
        gradients=adapter,
        optimizer=None if any(size is None for size in states) else sum(size or 0 for size in states),
    )


def _frozen_bytes(model: nn.Module, quantization: Mapping[str, Any]) -> int:
    quantized = _quantized_weights(model, quantization)
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        if id(parameter) in quantized:
            total += _quantized_bytes(parameter, quantization)
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def _quantized_weights(model: nn.Module, quantization: Mapping[str, Any]) -> set[int]:
    """The weights that bitsandbytes replaces: those of every linear layer but the output layer."""
    if not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        return set()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {id(output.weight)} if output is not None else set()
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in kept
    }


def _quantized_bytes(weight: nn.Parameter, quantization: Mapping[str, Any]) -> int:
    numbers = weight.numel()
    if quantization.get("load_in_8bit"):
        return numbers + 4 * weight.shape[0]  # a scale for each row
    scales = -(-numbers // BLOCK_4BIT)
    if quantization.get("bnb_4bit_use_double_quant"):
        return numbers // 2 + scales + 4 * -(-scales // BLOCK_OF_SCALES)
    return numbers // 2 + 4 * scales
