"""Measure a run's parameters and memory."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the trained and all parameters; a 4-bit weight counts as the numbers that it packs."""
    trained = total = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit numbers a byte and keeps the shape that they stand for.
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the last `reset_peak_memory`.

    On a GPU the memory that torch had allocated, on a CPU the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration, ValueError):  # on Linux, where it can be reset
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def reset_peak_memory() -> None:
    """Start counting the peak anew, as far as the system allows, for the next job of a process."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)
