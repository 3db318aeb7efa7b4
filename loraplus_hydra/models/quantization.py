"""Quantisation of base models, with corrections for errors in bitsandbytes and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

from loraplus_hydra.config.targets import instantiate
from loraplus_hydra.loraplus.memory import HEADS

_COMPUTE_DTYPE = "bnb_4bit_compute_dtype"


def quantization_config(quantization: Mapping[str, Any] | None, auto_dtype: Any = None) -> Any:
    """Build the quantisation config of the group. Return None without quantisation.

    `auto_dtype` is the checkpoint's dtype, used for `model.dtype=auto`.
    """
    if quantization is None or not is_quantized(quantization):
        return None
    arguments = dict(quantization)
    if arguments.get(_COMPUTE_DTYPE) == "auto":
        arguments[_COMPUTE_DTYPE] = str(auto_dtype or "float32").removeprefix("torch.")
    return instantiate(arguments)


def is_quantized(quantization: Mapping[str, Any] | None) -> bool:
    """Return True if the `quantization` group has a class."""
    return bool(quantization) and quantization is not None and quantization.get("_target_") is not None


def skip_heads(quantized: Any, model: Any) -> None:
    """Exclude the heads of `model` from quantisation, because the heads are trained.

    `model` may be on the meta device. The layers that transformers excludes by default stay excluded.
    """
    if isinstance(quantized, BitsAndBytesConfig):  # transformers 5.23 quantises a classifier's head
        heads = (name for name in HEADS if hasattr(model, name))
        skipped = quantized.llm_int8_skip_modules or ()  # transformers would quantise the output layer beside these
        quantized.llm_int8_skip_modules = sorted({*skipped, *get_keys_to_not_convert(model), *heads})


def disable_cpu_repacking(model: nn.Module) -> None:
    """Disable bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16."""
    # Repacking happens in the first evaluation and permanently rounds the scales to bfloat16. The repacked product has
    # no gradient, so all later training has wrong gradients (bitsandbytes 0.50.2, `Linear4bit.forward`).
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantize(model: Any, dtype: str) -> Any:
    """Return a quantised model with dequantised weights in `dtype`.

    `auto` is the dtype of the model's computations.
    """
    full = model.dequantize() if dtype == "auto" else model.dequantize(dtype=getattr(torch, dtype))
    if hasattr(full.config, "quantization_config"):
        del full.config.quantization_config  # otherwise loading would quantise the weights again
    return full
