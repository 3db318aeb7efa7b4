"""What a run took: parameters and memory."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of the model: trained and all; a 4-bit weight counts as the numbers that it packs."""
    trained = total = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit numbers a byte and keeps the shape that they stand for.
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def peak_memory_bytes(device: torch.device) -> int:
    """Most GPU memory that torch had allocated, or on a CPU the most memory that the process had resident."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
