"""Measurements of a run's parameters and memory."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass
class Throughput:
    """The tokens of training steps and the seconds that these took, in this process."""

    tokens: int = 0
    seconds: float = 0.0

    def take(self) -> float | None:
        """Return the tokens per second since the last call; None without tokens."""
        speed = self.tokens / self.seconds if self.tokens and self.seconds else None
        self.tokens, self.seconds = 0, 0.0
        return speed


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters. A packed 4-bit weight counts unpacked."""
    trained = total = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit numbers into a byte and stores the original shape.
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the last `reset_peak_memory`.

    On a GPU this is the memory that torch allocated, on a CPU the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration, ValueError):  # Linux has a peak that can be reset
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # on Linux the unit is KiB


def reset_peak_memory() -> None:
    """Reset the peak memory for the next job of the process, if the system allows it."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)
