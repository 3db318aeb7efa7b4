"""Checks of the groups `adapter` and `quantization`, alone and together."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from loraplus_hydra.check.signatures import argument_problems
from loraplus_hydra.errors import Problem, first_line, nearest
from loraplus_hydra.models.adapter import peft_arguments, schedule_of
from loraplus_hydra.models.initialisation import changes_base
from loraplus_hydra.models.quantization import quantization_config

_KINDS_4BIT = ("nf4", "fp4")
# PEFT methods whose model needs more than a batch's tokens, which no Trainer here passes.
_NEEDS_MORE = {"PolyConfig": "needs a task_id in each row", "XLoraConfig": "needs several trained adapters"}


def adapter_problems(config_class: type, adapter: dict[str, Any], trainer: dict[str, Any]) -> list[Problem]:
    """Return the errors of an `adapter` group whose class is a PEFT config."""
    arguments = {key: value for key, value in peft_arguments(adapter).items() if key != "_target_"}
    problems = argument_problems(config_class, arguments, "adapter")
    if why := _NEEDS_MORE.get(config_class.__name__):
        problems.append(Problem("adapter._target_", f"{config_class.__name__} {why}", "use adapter=lora"))
    if schedule := schedule_of(config_class):
        problems += schedule.problems(adapter, trainer)
    return problems


def quantization_problems(
    config_class: type, quantization: dict[str, Any], adapter: dict[str, Any], trainer: dict[str, Any]
) -> list[Problem]:
    """Return the errors of a quantisation config, and of the adapter with this quantisation."""
    arguments = {key: value for key, value in quantization.items() if key != "_target_"}
    # The class accepts any keyword argument and ignores unknown ones.
    names = [name for name, kind in inspect.signature(config_class).parameters.items() if kind.kind != kind.VAR_KEYWORD]
    problems = [
        Problem(f"quantization.{name}", f"{config_class.__name__} has no such argument{nearest(name, names)}")
        for name in arguments
        if name not in names
    ]
    if not problems:
        try:
            quantizer = AutoHfQuantizer.from_config(quantization_config(quantization), pre_quantized=False)
            # As loading does: packages that are missing, and devices.
            quantizer.validate_environment(device_map={"": "cpu"} if trainer.get("use_cpu") else None)
        except (ValueError, TypeError, ImportError, AttributeError, RuntimeError) as error:
            problems.append(Problem("quantization", first_line(error), "see the class's documentation"))
    kind = arguments.get("bnb_4bit_quant_type", "fp4")
    if kind not in _KINDS_4BIT:  # bitsandbytes looks it up while it quantises
        key = "quantization.bnb_4bit_quant_type"
        problems.append(Problem(key, f"there is no '{kind}'{nearest(kind, _KINDS_4BIT)}", "use one of nf4, fp4"))
    if changes_base(adapter.get("init_lora_weights")):
        what = f"'{adapter['init_lora_weights']}' is computed from the base's weights, but these are quantised"
        problems.append(Problem("adapter.init_lora_weights", what, "use quantization=none, or adapter=lora"))
    if adapter.get("use_dora") and quantization.get("load_in_8bit") and not _on_gpu(trainer):
        # PEFT 0.21.2 computes the norm without the scales of bitsandbytes' 8-bit weights.
        what = "PEFT can't compute the norms of 8-bit weights on a CPU"
        problems.append(Problem("adapter.use_dora", what, "use quantization=nf4 or none, or adapter=lora"))
    return problems


def _on_gpu(trainer: dict[str, Any]) -> bool:
    return torch.cuda.is_available() and not trainer.get("use_cpu")
