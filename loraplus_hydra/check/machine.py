"""Checks that this machine has the kernels, dtypes and packages that the config needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._triton import has_triton
from transformers import utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplus_hydra.errors import Problem, nearest
from loraplus_hydra.io.processes import world_size
from loraplus_hydra.training.deepspeed_settings import read_settings

# Kernel -> transformers' function that searches for the package it needs, and the package's name.
_PACKAGED = {
    "flash_attention_2": ("is_flash_attn_2_available", "flash-attn"),
    "flash_attention_3": ("is_flash_attn_3_available", "flash-attn-3"),
}


def machine_problems(plain: dict[str, Any]) -> list[Problem]:
    """Return a Problem for each requirement that this machine doesn't meet."""
    model, trainer = plain.get("model", {}), plain.get("trainer", {})
    return [
        *_attention(model.get("attention"), model.get("trust_remote_code")),
        *_dtype(model.get("dtype"), trainer.get("use_cpu")),
        *_compiler(trainer),
        *_auto_batch(trainer),
        *_bitsandbytes(plain.get("quantization", {})),
        *_split_quantised(plain),
        *_settings(trainer.get("accelerator_config"), "trainer.accelerator_config"),
        *_settings(trainer.get("fsdp_config"), "trainer.fsdp_config"),
    ]


def _attention(name: Any, trusted: Any) -> list[Problem]:
    key = "model.attention"
    if name is None:
        return []
    if "/" in str(name):  # kernels that transformers would download from a hub and run
        fix = "set model.trust_remote_code=true to run it"
        return [] if trusted else [Problem(key, f"'{name}' is code from a hub", fix)]
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS})
    if name not in known:
        return [Problem(key, f"there is no attention '{name}'{nearest(name, known)}", f"use one of {', '.join(known)}")]
    available, package = _PACKAGED.get(name, ("", ""))
    if package and not getattr(utils, available)():
        return [Problem(key, f"'{name}' needs the package {package} and a GPU that it supports", "use sdpa")]
    return []


def _dtype(dtype: Any, use_cpu: Any) -> list[Problem]:
    if dtype != "bfloat16" or use_cpu or not torch.cuda.is_available() or torch.cuda.is_bf16_supported():
        return []
    return [Problem("model.dtype", "this GPU doesn't support bfloat16", "use float16 or float32")]


def _auto_batch(trainer: dict[str, Any]) -> list[Problem]:
    what = "needs a single process" if world_size() > 1 else "can't be used with DeepSpeed"
    if trainer.get("auto_batch") and (world_size() > 1 or trainer.get("deepspeed")):
        return [Problem("trainer.auto_batch", what, "set trainer.per_device_train_batch_size")]
    return []


def _compiler(trainer: dict[str, Any]) -> list[Problem]:
    backend, mode = trainer.get("torch_compile_backend"), trainer.get("torch_compile_mode")
    if not (trainer.get("torch_compile") or backend or mode):
        return []
    if backend in (None, "inductor"):
        modes = torch._inductor.list_mode_options()
        return [*_compile_name("torch_compile_mode", mode, [*modes]), *_inductor(trainer)]
    return _compile_name("torch_compile_backend", backend, torch.compiler.list_backends(()))


def _compile_name(key: str, name: Any, known: list[str]) -> list[Problem]:
    """Check a name that torch itself checks only when it compiles the first step."""
    if name is None or name in known:
        return []
    return [Problem(f"trainer.{key}", f"there is no '{name}'{nearest(name, known)}", f"use one of {', '.join(known)}")]


def _inductor(trainer: dict[str, Any]) -> list[Problem]:
    """Check that this machine has the tools that torch's compiler needs."""
    if torch.cuda.is_available() and not trainer.get("use_cpu"):
        lacks = "" if has_triton() else "compiling for this GPU needs triton"
    else:
        lacks = "" if _has_cpp_compiler() else "compiling needs a C++ compiler, but there is none"
    return [Problem("trainer.torch_compile", lacks, "set it to false")] if lacks else []


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second, and few runs compile
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True


def _bitsandbytes(quantization: dict[str, Any]) -> list[Problem]:
    is_needed = str(quantization.get("_target_")).endswith("BitsAndBytesConfig")
    if not is_needed or utils.is_bitsandbytes_available():
        return []
    return [Problem("quantization", "bitsandbytes isn't installed", "install it, or use quantization=none")]


def _split_quantised(plain: dict[str, Any]) -> list[Problem]:
    """Return a Problem for quantised weights that FSDP can't split."""
    quantization = plain.get("quantization", {})
    if not plain.get("trainer", {}).get("fsdp"):
        return []
    if quantization.get("load_in_8bit"):
        what = "FSDP can't split 8-bit weights: their scales get lost"
        return [Problem("quantization", what, "use quantization=nf4, or trainer=ddp")]
    stored = quantization.get("bnb_4bit_quant_storage") or "uint8"
    if not quantization.get("load_in_4bit") or stored not in ("uint8", "int8"):
        return []
    what = f"FSDP splits only floating-point tensors, but 4-bit weights are stored as {stored}"
    fix = "set +quantization.bnb_4bit_quant_storage=bfloat16, or as model.dtype; the bits stay the same"
    return [Problem("quantization.bnb_4bit_quant_storage", what, fix)]


def _settings(given: Any, key: str) -> list[Problem]:
    """Return the Problem of a JSON file of settings that can't be read."""
    try:
        if isinstance(given, str):
            read_settings(given)
    except (OSError, ValueError) as error:
        return [Problem(key, f"it can't be read: {error}", "use a JSON file with these settings")]
    return []
