"""Settings of glibc's memory allocator, so that memory freed by a step is reused by the next."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

# mallopt(3). By default glibc maps new memory for every large tensor, and every page then causes a page fault.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees. Return True if the C library is glibc.

    A training step on a CPU becomes faster, because fewer pages are mapped anew. The process keeps its peak memory
    until it ends. A second call changes nothing.
    """
    with suppress(ValueError, OSError, AttributeError):
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            libc = ctypes.CDLL("libc.so.6")
            return all(libc.mallopt(name, value) == 1 for name, value in _SETTINGS.items())
    return False
