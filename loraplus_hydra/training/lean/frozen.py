"""Products with a frozen weight matrix, by the faster float32 library on this processor."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

_LARGEST = 2**28  # maximum number of packed elements; their copies take 2 GB


class Frozen:
    """A frozen weight, [out, in], and its products in both directions.

    With `packed`, oneDNN multiplies, in float32 like BLAS. It uses copies of the weight, which take twice the weight's
    memory. If the weight is cast or moved later, BLAS is used instead.
    """

    def __init__(self, weight: torch.Tensor, *, packed: bool = False) -> None:
        self.weight = weight
        self._packed = _pack(weight) if packed and _can_pack(weight) else None
        self._packed_from = 0 if self._packed is None else weight.data_ptr()

    @property
    def is_packed(self) -> bool:
        """Return True if oneDNN multiplies in float32."""
        return self._packed is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T, [tokens, out], for x [tokens, in]."""
        return x @ self.weight.t() if not self._usable(x) else _product(x, self._packed[0])  # type: ignore[index]

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return g W, [tokens, in], for g [tokens, out]."""
        if not self._usable(gradient):
            return gradient @ self.weight
        return _product(gradient, self._packed[1])  # type: ignore[index]

    def _usable(self, x: torch.Tensor) -> bool:
        return self._packed is not None and x.dtype == torch.float32 and self.weight.data_ptr() == self._packed_from


def _can_pack(weight: torch.Tensor) -> bool:
    usable = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_data = not isinstance(weight, FakeTensor)  # a trace of the step's memory has none
    return usable and has_data and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight and its transpose in oneDNN's own layout.

    torch has no public function for this layout.
    """
    weight = weight.detach()
    both = (weight.contiguous(), weight.t().contiguous())
    return tuple(torch.ops.mkldnn._reorder_linear_weight(each, None) for each in both)  # type: ignore[return-value]


def _product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, None, "none", [], "")


def should_pack(weights: Iterable[torch.Tensor]) -> bool:
    """Return True if oneDNN should multiply by a model's frozen `weights`.

    It should if oneDNN is faster and the weights are small. The decision doesn't depend on measurements, because a
    resumed run must compute the same bits as an uninterrupted run on the same machine.
    """
    return onednn_is_faster() and sum(each.numel() for each in weights) <= _LARGEST


@functools.cache
def onednn_is_faster() -> bool:
    """Return True if torch uses MKL on a processor for which MKL uses slow code.

    These are all x86 processors except Intel's. On these, oneDNN is faster.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
