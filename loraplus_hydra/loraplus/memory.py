"""Memory of training: weights, adapter, gradients, optimizer state, and activations if they are known.

The optimizer's state is measured: the run's optimizer class takes one step on stand-ins with the trained tensors'
shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line
from loraplus_hydra.loraplus.optimizer import build_optimizer
from loraplus_hydra.loraplus.plan import Plan, PlannedTensor, StateSize
from loraplus_hydra.loraplus.rules import TensorRecord
from loraplus_hydra.loraplus.settings import LoraPlus

HEADS = ("score", "classifier", "qa_outputs")  # transformers' names of heads, which are not quantised
BLOCK_4BIT = 64  # numbers that share one scale in bitsandbytes' 4-bit weights
BLOCK_OF_SCALES = 256  # scales that share one scale again, with double quantisation
LARGEST_STAND_IN = 2**21  # numbers; a larger tensor's stand-in has only its first rows

Kind = tuple[str, tuple[int, ...], bool, str]  # group, shape, whether it is a trained embedding, and dtype


@dataclass(frozen=True)
class Memory:
    """Memory in bytes. `optimizer` is None if the optimizer's state could not be measured."""

    weights: int  # frozen weights, in the dtype in which they are loaded
    adapter: int  # trained tensors
    gradients: int  # gradients of the trained tensors
    optimizer: int | None
    activations: int | None = None  # the rest of a step's peak; None if unknown

    @property
    def total(self) -> int:
        """The sum of all known parts."""
        return self.weights + self.adapter + self.gradients + (self.optimizer or 0) + (self.activations or 0)


def estimate(model: nn.Module, plan: Plan, quantization: Mapping[str, Any] | None = None) -> Memory:
    """Estimate the memory of training `model` by `plan`. The plan's optimizer state must be measured.

    The model may be on the meta device. `quantization` holds BitsAndBytesConfig's `load_in_4bit`, `load_in_8bit`,
    `bnb_4bit_use_double_quant` and `llm_int8_skip_modules`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = sum(parameter.numel() * parameter.element_size() for parameter in trained.values())
    states = [tensor.state for tensor in plan.tensors]
    return Memory(
        weights=_frozen_bytes(model, quantization or {}),
        adapter=adapter,
        gradients=adapter,
        optimizer=None if None in states else sum(state.bytes for state in states if state is not None),
    )


def measure_state(plan: Plan, settings: LoraPlus) -> Plan:
    """Return `plan` with the measured size of each tensor's optimizer state.

    The sizes stay None for an optimizer class that can only step on a GPU. Raises ConfigErrors for arguments with which
    it can't step, though it can without them.
    """
    # One stand-in for each kind of tensor of a group: equal shapes have equal states.
    records = {_kind(tensor): tensor.record for tensor in plan.tensors}
    optimizer, stand_ins = _stand_in_optimizer(plan, records, settings, settings.constructor_arguments())
    if error := _step_error(optimizer):
        try:
            default, _ = _stand_in_optimizer(plan, records, settings, {"lr": settings.lr})
        except UserError:  # the class can't be built from its defaults, so the cause is unknown
            return plan
        if _step_error(default):
            return plan
        what = f"{settings.optimizer_class.__name__} can't take a step with these arguments: {error}"
        raise ConfigErrors([Problem("optimizer", what)])
    sizes = {kind: _state_size(optimizer.state[one], one, records[kind].numel) for kind, one in stand_ins.items()}
    return replace(plan, tensors=tuple(tensor._replace(state=sizes[_kind(tensor)]) for tensor in plan.tensors))


def _stand_in_optimizer(
    plan: Plan, records: Mapping[Kind, TensorRecord], settings: LoraPlus, arguments: Mapping[str, Any]
) -> tuple[Optimizer, dict[Kind, nn.Parameter]]:
    """Return the optimizer of stand-ins, and the stand-in of each kind of tensor."""
    stand_ins = {kind: _stand_in(record) for kind, record in records.items()}
    groups = [
        replace(group, records=tuple(record for kind, record in records.items() if kind[0] == group.name))
        for group in plan.groups
    ]
    named = ((records[kind].name, stand_in) for kind, stand_in in stand_ins.items())
    # Without pairs, every tensor is updated like those outside the pairs, whose state has the same size
    return build_optimizer(settings.optimizer_class, groups, named, arguments, pairs=()), stand_ins


def _step_error(optimizer: Optimizer) -> str:
    """Return why the optimizer can't take a step; empty if it can."""
    try:
        optimizer.step()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return first_line(error)
    return ""


def _kind(tensor: PlannedTensor) -> Kind:
    record = tensor.record
    return tensor.group.name, record.shape, record.trained_embedding, record.dtype


def _stand_in(record: TensorRecord) -> nn.Parameter:
    stand_in = nn.Parameter(torch.zeros(_bounded(record.shape), dtype=getattr(torch, record.dtype)))
    stand_in.grad = torch.ones_like(stand_in)
    return stand_in


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape`, with fewer rows if it has too many elements.

    The limit is far above bitsandbytes' `min_8bit_size`, so the state's number of bits stays the same.
    """
    numbers = math.prod(shape)
    if numbers <= LARGEST_STAND_IN or not shape:
        return shape
    return (max(1, shape[0] * LARGEST_STAND_IN // numbers), *shape[1:])


def _state_size(state: Mapping[str, Any], stand_in: nn.Parameter, numel: int) -> StateSize:
    """Return the size of a tensor's state, scaled from the stand-in's size to `numel` elements."""
    numbers = stand_in.numel()
    # bitsandbytes' quantisation maps (qmap1, qmap2) are one tensor for all parameters
    tensors = [x for name, x in state.items() if isinstance(x, torch.Tensor) and not name.startswith("qmap")]
    size = sum(value.numel() * value.element_size() for value in tensors)
    bits = max((value.element_size() * 8 for value in tensors if value.numel() >= numbers > 1), default=0)
    return StateSize(bits, round(size * numel / max(1, numbers)))


def _frozen_bytes(model: nn.Module, quantization: Mapping[str, Any]) -> int:
    quantized = _quantized_weights(model, quantization)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum(
        _quantized_bytes(each.numel(), quantized[id(each)], quantization)
        if id(each) in quantized
        else each.numel() * each.element_size()
        for each in frozen
    )


def _quantized_weights(model: nn.Module, quantization: Mapping[str, Any]) -> dict[int, int]:
    """Return the weights that bitsandbytes quantises: id -> number of outputs.

    These are all linear layers except the heads, and the layers that `llm_int8_skip_modules` names.
    """
    if not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        return {}
    # takes seconds, and only quantised models need it
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    base: Any = getattr(model, "get_base_model", lambda: model)()
    output = getattr(base, "get_output_embeddings", lambda: None)()
    # A layer of PEFT around the output layer has the original layer and a copy
    kept = set() if output is None else {id(parameter) for parameter in output.parameters()}
    skipped = [*(name for name in HEADS if hasattr(base, name)), *(quantization.get("llm_int8_skip_modules") or ())]
    return {
        id(module.weight): module.nf if isinstance(module, Conv1D) else module.out_features
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))  # GPT-2's layers are Conv1D, whose weight is transposed
        and not module.weight.requires_grad
        and id(module.weight) not in kept
        and should_convert_module(_name_without_adapter(name), skipped)
    }


def _name_without_adapter(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _quantized_bytes(numbers: int, outputs: int, quantization: Mapping[str, Any]) -> int:
    if quantization.get("load_in_8bit"):
        return numbers + 4 * outputs  # a scale for each output
    scales = -(-numbers // BLOCK_4BIT)
    if quantization.get("bnb_4bit_use_double_quant"):
        return numbers // 2 + scales + 4 * -(-scales // BLOCK_OF_SCALES)
    return numbers // 2 + 4 * scales
