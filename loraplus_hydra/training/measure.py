"""Measurements of a run's parameters and memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_GROUPS = Path("/sys/fs/cgroup")


@dataclass
class Throughput:
    """The tokens of training steps and the seconds that these took, in this process."""

    tokens: int = 0
    seconds: float = 0.0
    _taken: tuple[int, float] = (0, 0.0)  # tokens and seconds at the last call of `take`

    @property
    def mean(self) -> float | None:
        """The tokens per second of all steps; None without tokens."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    def take(self) -> float | None:
        """Return the tokens per second since the last call; None without tokens."""
        tokens, seconds = self.tokens - self._taken[0], self.seconds - self._taken[1]
        self._taken = (self.tokens, self.seconds)
        return tokens / seconds if tokens and seconds else None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters. A packed 4-bit weight counts unpacked."""
    trained = total = 0
    for parameter in model.parameters():
        count = numbers_of(parameter)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def numbers_of(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter has, unpacked."""
    # bitsandbytes packs two 4-bit numbers into a byte and stores the original shape.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the last `reset_peak_memory`.

    On a GPU this is the memory that torch allocated, on a CPU the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration, ValueError):  # Linux has a peak that can be reset
        return _kilobytes("/proc/self/status", "VmHWM:")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # on Linux the unit is KiB


def reset_peak_memory() -> None:
    """Reset the peak memory for the next job of the process, if the system allows it."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)


def available_memory_bytes(*, on_gpu: bool) -> int | None:
    """Return the memory that this process can still allocate on its GPU or for a CPU; None if unknown.

    On a CPU this is the least of the machine's free memory, the memory of the process's control groups, and the limit
    of its address space.
    """
    if on_gpu:
        return torch.cuda.mem_get_info()[0]
    found = [*_left_in_groups()]
    with suppress(OSError, StopIteration, ValueError):
        found.append(_kilobytes("/proc/meminfo", "MemAvailable:"))
    with suppress(OSError, StopIteration, ValueError):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - _kilobytes("/proc/self/status", "VmSize:"))
    return max(0, min(found)) if found else None


def _left_in_groups() -> Iterator[int]:
    """Yield the memory that is left in each control group of the process (cgroup v2) that has a limit."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        group = _GROUPS / next(line for line in lines if line.startswith("0::")).removeprefix("0::").lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(_GROUPS):
                with suppress(OSError, ValueError):  # `max` is no limit
                    limit = int((folder / "memory.max").read_text(encoding="ascii"))
                    yield limit - int((folder / "memory.current").read_text(encoding="ascii"))


def _kilobytes(file: str, name: str) -> int:
    """Return the bytes of a line `name ... kB` of a file of /proc."""
    lines = Path(file).read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
