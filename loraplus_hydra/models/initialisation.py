"""Initialisations of LoRA's factors: Init[2] of the paper, and those that change the base.

PiSSA and OLoRA move a part of each weight W into A0 and B0 and leave W - s B0 A0 in the base, so their adapter is right
only on that base. On the original one the same function is W + s (B A - B0 A0), a plain LoRA of twice the rank.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.loraplus.peft_layers import A_ZERO, ADAPTER_NAME, note_initialisation

# Initialisations for which PEFT needs more than a config, and silently does something else without it.
UNSUPPORTED = {
    "eva": "it needs activations over the data first (peft.initialize_lora_eva_weights)",
    "corda": "it needs covariances over the data first (peft.tuners.lora.corda.preprocess_corda)",
    "lora_ga": "it needs gradients over the data first (peft.preprocess_loraga)",
    "loftq": "it changes the base's weights by more than an adapter can hold, so the saved adapter would be wrong",
}


def changes_base(init_lora_weights: Any) -> bool:
    """Return True if this initialisation takes a part of the base's weights away."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(("pissa", "olora"))


def initialise_a_zero(model: nn.Module) -> None:
    """Initialise the factors by Init[2] of the LoRA+ paper: A is zero, B is random.

    B gets the distribution that PEFT gives A by default: uniform within +-1/sqrt(fan in). B's fan in is the rank, in a
    convolution times the kernel's size. LoRA on embeddings is left unchanged: PEFT makes A zero and B random there.
    Random numbers come from the global generator, so seed it before.
    """
    found = False
    for module in model.modules():
        lora_A, lora_B = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
        if ADAPTER_NAME in lora_A and hasattr(lora_A[ADAPTER_NAME], "weight"):
            nn.init.zeros_(lora_A[ADAPTER_NAME].weight)
            nn.init.kaiming_uniform_(lora_B[ADAPTER_NAME].weight, a=math.sqrt(5))
            found = True
    if not found:
        what = "a_zero initialises LoRA's factors, and this adapter has none"
        raise ConfigErrors([Problem("adapter.init_lora_weights", what, "use true")])
    note_initialisation(model, A_ZERO)


def copy_factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return CPU copies of every lora_A and lora_B, by their names in PEFT's files."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if name.endswith((f"lora_A.{ADAPTER_NAME}.weight", f"lora_B.{ADAPTER_NAME}.weight"))
    }


def convert_to_original_base(
    tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Convert an adapter whose initialisation changed the base into a plain LoRA of twice the rank.

    The result fits the original base. `tensors` are the adapter's file, `initial` the `copy_factors` before training.
    """
    # PEFT's own conversion does the same to A and B and drops all else: a classification head, DoRA's magnitudes, new
    # tokens.
    converted = dict(tensors)
    for name, factor in initial.items():
        before = factor.to(tensors[name].dtype)
        both, dim = ([tensors[name].cpu(), before], 0) if ".lora_A." in name else ([tensors[name].cpu(), -before], 1)
        converted[name] = torch.cat(both, dim=dim)
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    growth = math.sqrt(2) if config.use_rslora else 2  # the update is scaled by alpha / sqrt(r) or alpha / r
    plain.r, plain.lora_alpha = 2 * config.r, _number(growth * config.lora_alpha)
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: _number(growth * alpha) for key, alpha in (config.alpha_pattern or {}).items()}
    return converted, plain


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
