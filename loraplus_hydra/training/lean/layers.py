"""LoRA's linear layers on joined rows, with fewer products and copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from loraplus_hydra.training.lean.frozen import Frozen


class _Adapted(torch.autograd.Function):
    """y = x W^T + bias + s (d(x) A^T) B^T, with d the dropout; W and the bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        frozen: Frozen,
        bias: torch.Tensor | None,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        out = frozen.forward(tokens)
        if bias is not None:
            out += bias
        mask = None
        given = tokens = tokens.to(lora_A.dtype)
        if dropout > 0.0:
            mask = torch.empty_like(tokens).bernoulli_(1 - dropout)
            if dropout < 1.0:
                mask.div_(1 - dropout)
            given = tokens * mask
        inner = given @ lora_A.t()
        if out.dtype == lora_B.dtype:
            out.addmm_(inner, lora_B.t(), alpha=scaling)
        else:  # a base in bfloat16, the adapter in float32
            out = torch.addmm(out.to(lora_B.dtype), inner, lora_B.t(), alpha=scaling).to(out.dtype)
        ctx.frozen, ctx.scaling, ctx.dtype = frozen, scaling, x.dtype
        ctx.save_for_backward(given, inner, mask, lora_A, lora_B)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        given, inner, mask, lora_A, lora_B = ctx.saved_tensors
        grad = gradient.reshape(-1, gradient.shape[-1])
        wide = grad.to(lora_B.dtype)
        grad_inner = (wide @ lora_B).mul_(ctx.scaling)
        grad_B = torch.mm(wide.t(), inner).mul_(ctx.scaling) if ctx.needs_input_grad[2] else None
        grad_A = torch.mm(grad_inner.t(), given) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.frozen.backward(grad)
            if mask is None and grad_x.dtype == lora_A.dtype:
                grad_x.addmm_(grad_inner, lora_A)
            else:
                through = grad_inner @ lora_A
                grad_x = (grad_x + (through if mask is None else through.mul_(mask))).to(ctx.dtype)
            grad_x = grad_x.view(*gradient.shape[:-1], grad_x.shape[-1])
        return grad_x, grad_A, grad_B, None, None, None, None


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + bias, both frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, frozen: Frozen, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.frozen = frozen
        out = frozen.forward(x.reshape(-1, x.shape[-1]))
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        grad = ctx.frozen.backward(gradient.reshape(-1, gradient.shape[-1]))
        return grad.view(*gradient.shape[:-1], grad.shape[-1]), None, None


def lend_lean_layers(model: nn.Module, underway: Callable[[], bool], *, packed: bool) -> int:
    """Give the model's linear layers a lean forward. Return the number of these layers.

    The lean forward is used while `underway()` is True. Layers that are not plain LoRA on a plain linear layer stay
    unchanged. Outside of a lean forward, for example in generation, all layers stay unchanged. With `packed`, oneDNN
    multiplies by frozen weights, and frozen layers without an adapter get a lean forward, too.
    """
    adapted = [module for module in model.modules() if _is_plain_lora(module)]
    for layer in adapted:
        _lend(layer, _lora_forward(layer, packed), underway)
    frozen = _frozen_linears(model, adapted) if packed else []
    for linear in frozen:
        _lend(linear, _frozen_forward(linear), underway)
    return len(adapted) + len(frozen)


def _lend(layer: nn.Module, lean: Callable[[torch.Tensor], torch.Tensor], underway: Callable[[], bool]) -> None:
    plain = layer.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not underway() or args or kwargs or torch.is_autocast_enabled(x.device.type):
            return plain(x, *args, **kwargs)
        return lean(x)

    layer.forward = forward


def _lora_forward(layer: Any, packed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    name = layer.active_adapters[0]
    base, lora_A, lora_B = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    frozen, dropout = Frozen(base.weight, packed=packed), layer.lora_dropout[name]

    def forward(x: torch.Tensor) -> torch.Tensor:
        if layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
            return type(layer).forward(layer, x)
        share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if not torch.is_grad_enabled() and share == 0.0 and _merging_pays(x, frozen, lora_A.weight):
            merged = torch.addmm(base.weight, lora_B.weight, lora_A.weight, alpha=layer.scaling[name])
            return nn.functional.linear(x, merged, base.bias)
        return _Adapted.apply(x, lora_A.weight, lora_B.weight, frozen, base.bias, layer.scaling[name], share)

    return forward


def _merging_pays(x: torch.Tensor, frozen: Frozen, lora_A: torch.Tensor) -> bool:
    """Return True if one product with a temporarily merged weight is faster than three products.

    A merged weight in bfloat16 would lose small updates, and oneDNN has packed only the frozen weight.
    """
    outputs, inputs = frozen.weight.shape
    is_exact = frozen.weight.dtype == lora_A.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
    return is_exact and not frozen.is_packed and x.numel() // inputs * (inputs + outputs) > 2 * inputs * outputs


def _frozen_forward(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    frozen = Frozen(linear.weight, packed=True)
    return lambda x: _FrozenProduct.apply(x, frozen, linear.bias)


def _is_plain_lora(module: Any) -> bool:
    """Return True for PEFT's LoRA on an `nn.Linear`, with one adapter that has only its two factors."""
    if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear or module.fan_in_fan_out:
        return False
    names = module.active_adapters
    return (
        len(names) == 1
        and names[0] in module.lora_A
        and not module.lora_variant  # DoRA and other variants
        and module.lora_B[names[0]].bias is None
        and _is_frozen(module.base_layer)
    )


def _frozen_linears(model: nn.Module, adapted: list[nn.Module]) -> list[nn.Linear]:
    known = {id(layer.base_layer) for layer in adapted}
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear and id(module) not in known and _is_frozen(module)
    ]


def _is_frozen(linear: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in linear.parameters())
