"""Quantised base models: what transformers loads them with, and bitsandbytes kept true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraplus_hydra.config.targets import instantiate

if TYPE_CHECKING:
    from torch import nn

_HEADS = ("score", "classifier", "qa_outputs")  # transformers' names
_COMPUTE_DTYPE = "bnb_4bit_compute_dtype"


def quantization_config(quantization: Mapping[str, Any] | None, auto_dtype: Any = None) -> Any:
    """The quantisation config of the group, or None when nothing is quantised.

    `auto_dtype` is the dtype that `model.dtype=auto` stands for: the checkpoint's.
    """
    if not is_quantized(quantization):
        return None
    assert quantization is not None
    arguments = dict(quantization)
    if arguments.get(_COMPUTE_DTYPE) == "auto":
        arguments[_COMPUTE_DTYPE] = str(auto_dtype or "float32").removeprefix("torch.")
    return instantiate(arguments)


def is_quantized(quantization: Mapping[str, Any] | None) -> bool:
    """Whether the `quantization` group of a config asks for anything."""
    return bool(quantization) and quantization is not None and quantization.get("_target_") is not None


def leave_heads_alone(quantized: Any, model: Any) -> None:
    """Have `quantized` spare the heads of `model`, which train: transformers 5.23 quantises a classifier's.

    `model` may be on the meta device. What transformers spares by default, the output layer, stays spared.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    if hasattr(quantized, "llm_int8_skip_modules"):
        spared = quantized.llm_int8_skip_modules or get_keys_to_not_convert(model)
        quantized.llm_int8_skip_modules = sorted({*spared, *(name for name in _HEADS if hasattr(model, name))})


def keep_weights_as_loaded(model: nn.Module) -> None:
    """Switch off bitsandbytes' repacking of 4-bit weights for inference on CPUs that know AVX512-BF16.

    It happens in the first evaluation, rounds the blocks' scales to bfloat16 for good, and the repacked product has no
    gradient: everything that is trained after it gets a wrong one (bitsandbytes 0.50.2, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantize(model: Any, dtype: str) -> Any:
    """A quantised model with the weights that its quantised ones stand for, in `dtype` (auto: as it computes)."""
    import torch

    full = model.dequantize() if dtype == "auto" else model.dequantize(dtype=getattr(torch, dtype))
    # Left behind, it would have the weights quantised again when they are loaded.
    if hasattr(full.config, "quantization_config"):
        del full.config.quantization_config
    return full
