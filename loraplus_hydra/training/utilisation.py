"""Model FLOPs utilisation: the share of a GPU's peak that a model's products take.

The term is of PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraplus_hydra.training.measure import numbers_of

# Dense products in 16 bits, in 10^12 FLOPs a second, from NVIDIA's data sheets, by the words of a GPU's name.
_PEAKS = {
    ("B200",): 2250.0,
    ("H200",): 989.0,
    ("H100", "HBM3"): 989.0,
    ("H100", "PCIe"): 756.0,
    ("A100",): 312.0,
    ("L40S",): 362.0,
    ("L4",): 121.0,
    ("V100", "SXM2"): 125.0,
    ("T4",): 65.0,
}
_PARTS = {"MIG", "NVL"}  # a share of a GPU, or a slower one of the same name
_WITHOUT_BFLOAT16 = {"V100", "T4"}


def flops_of_token(model: nn.Module) -> int | None:
    """Return the FLOPs that a training step needs for each token in the model's linear layers.

    Two a weight in the forward pass, two for the gradient of its input, and two for its own gradient if it is trained.
    The products between tokens, inside attention, are left out. None for a model with weights of three dimensions, such
    as experts and convolutions: there a token doesn't meet each number once.
    """
    if any(parameter.ndim > 2 for parameter in model.parameters()):
        return None
    layers = (layer for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D)))
    weights: list[nn.Parameter] = [layer.weight for layer in layers if isinstance(layer.weight, nn.Parameter)]
    return sum((6 if weight.requires_grad else 4) * numbers_of(weight) for weight in weights)


def peak_flops(gpu: str, dtype: torch.dtype) -> float | None:
    """Return the FLOPs a second that the GPU of this name does in `dtype`, 16 bits; None if unknown."""
    words = set(re.split("[ -]", gpu))
    if dtype not in (torch.bfloat16, torch.float16) or words & _PARTS:
        return None
    if dtype is torch.bfloat16 and words & _WITHOUT_BFLOAT16:
        return None
    return next((1e12 * peak for name, peak in _PEAKS.items() if words.issuperset(name)), None)


def tokens_at_peak(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> float | None:
    """Return the tokens per second of training at which the device would be at its peak; None if unknown."""
    if device.type != "cuda":
        return None
    frozen = (each.dtype for each in model.parameters() if not each.requires_grad and each.is_floating_point())
    peak = peak_flops(torch.cuda.get_device_name(device), autocast or next(frozen, torch.float32))
    flops = flops_of_token(model)
    return peak / flops if peak and flops else None
