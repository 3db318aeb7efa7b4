"""The choice among torch's attention kernels on a GPU."""

from __future__ import annotations

import torch


def skip_cudnn_attention() -> None:
    """Let torch use its other attention kernels instead of cuDNN's.

    cuDNN compiles a kernel for every new shape. Batches of text have new lengths all the time, and a training step then
    takes several times as long (`benchmarks/README.md`, gpu).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
