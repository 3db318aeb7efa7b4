"""How LoRA's factors start: the paper's Init[2], and starts that take their factors out of the base's weights.

PiSSA and OLoRA put a part of each weight W into A0 and B0 and leave W - s B0 A0 in the base, so their adapter is right
only on that base. On the original one the same function is W + s (B A - B0 A0), a plain LoRA of twice the rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.loraplus.starts import A_ZERO, ADAPTER, note_start

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn

# Starts of PEFT's that need what nobody here gives them, so that PEFT would quietly train something else.
UNSUPPORTED = {
    "eva": "it needs activations over the data first (peft.initialize_lora_eva_weights)",
    "corda": "it needs covariances over the data first (peft.tuners.lora.corda.preprocess_corda)",
    "lora_ga": "it needs gradients over the data first (peft.preprocess_loraga)",
    "loftq": "it changes the base's weights by more than an adapter can hold, so what is saved would be wrong",
}


def changes_base(init_lora_weights: Any) -> bool:
    """Whether this start takes a part of the base's weights away."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(("pissa", "olora"))


def start_with_a_zero(model: nn.Module) -> None:
    """Init[2] of the LoRA+ paper: A = 0 and B random, with the distribution that A has under PEFT's Init[1].

    That is uniform within +-1/sqrt(fan in), B's fan in being the rank (times the kernel's size in a convolution). LoRA
    on embeddings starts so under PEFT already. Random numbers are the global generator's: seed it before.
    """
    import torch

    found = False
    for module in model.modules():
        lora_A, lora_B = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
        if ADAPTER in lora_A and hasattr(lora_A[ADAPTER], "weight"):
            torch.nn.init.zeros_(lora_A[ADAPTER].weight)
            torch.nn.init.kaiming_uniform_(lora_B[ADAPTER].weight, a=math.sqrt(5))
            found = True
    if not found:
        what = "a_zero is a start of LoRA's factors, and this adapter has none"
        raise ConfigErrors([Problem("adapter.init_lora_weights", what, "use true")])
    note_start(model, A_ZERO)


def factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies on the CPU of every lora_A and lora_B, named as PEFT names them in a file."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if name.endswith((f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight"))
    }


def on_original_base(
    tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """An adapter whose start changed the base, as the plain LoRA of twice the rank that is right on the original base.

    `initial` are the `factors` at the start. PEFT's own conversion does the same to A and B, and drops all else: a
    trained classification head, DoRA's magnitudes, new tokens.
    """
    import copy

    import torch

    converted = dict(tensors)
    for name, start in initial.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([tensors[name].cpu(), start.to(tensors[name].dtype)], dim=0)
        else:
            converted[name] = torch.cat([tensors[name].cpu(), -start.to(tensors[name].dtype)], dim=1)
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    # The update is scaled by alpha / r, or by alpha / sqrt(r).
    growth = math.sqrt(2) if config.use_rslora else 2
    plain.r, plain.lora_alpha = 2 * config.r, _number(growth * config.lora_alpha)
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: _number(growth * alpha) for key, alpha in (config.alpha_pattern or {}).items()}
    return converted, plain


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
