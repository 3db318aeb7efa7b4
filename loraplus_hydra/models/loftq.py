"""LoftQ's start: A and B are the error that quantisation makes in each weight, arXiv 2310.08659.

s B0 A0 is the matrix of rank r that is closest to W - Q, for a weight W and its quantised value Q. LoftQ is done with
one iteration, after which Q is the quantised W. So the base stays as it was quantised, and the adapter is a plain LoRA
for this base. Further iterations would change Q, which an adapter can't store.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import interrupts
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME


def initialise_loftq(model: PeftModel, original: nn.Module) -> float:
    """Set the factors of all 4-bit layers. `original` is the base without quantisation.

    Other layers keep the start that they have. Returns the share of the squared error that the factors remove, over all
    4-bit layers. Raises ConfigErrors if `original` is quantised, too, or if there is no error.
    """
    # PEFT 0.21.2's `replace_lora_weights_loftq` needs a GPU, and doesn't divide by the scale alpha / r.
    errors = removed = 0.0
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or not _is_4bit(layer.get_base_layer()):
            continue
        interrupts.stop_if_asked()
        weight: Any = original.get_submodule(name).weight
        if not weight.is_floating_point():
            what = "loftq needs the weights before quantisation, but the model's own files are quantised"
            raise ConfigErrors(
                [Problem("model.path", what, "name the model without quantisation, or use adapter=lora")]
            )
        quantised = dequantize_module_weight(layer.get_base_layer()).float()
        error = weight.to(quantised.device, torch.float32) - quantised
        a, b = closest_factors(error, layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME])
        # Copied, because the layout of b in memory would be another one, and with it the rounding of later products
        layer.lora_A[ADAPTER_NAME].weight.data.copy_(a)
        layer.lora_B[ADAPTER_NAME].weight.data.copy_(b)
        errors += float(error.square().sum())
        removed += float((layer.scaling[ADAPTER_NAME] * b @ a).square().sum())
    if not errors:
        what = "loftq starts from the error of 4-bit weights, but no adapted layer has such weights or an error"
        raise ConfigErrors([Problem("adapter.target_modules", what, "use adapter=lora")])
    return removed / errors


def closest_factors(matrix: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank x in) and B (out x rank) for which scale * B @ A is closest to `matrix` (out x in).

    Both factors get the square roots of the singular values.
    """
    u, singular, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    missing = rank - len(root)  # above 0 for a rank above the matrix's dimensions
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))


def _is_4bit(layer: nn.Module) -> bool:
    return type(getattr(layer, "weight", None)).__name__ == "Params4bit"
