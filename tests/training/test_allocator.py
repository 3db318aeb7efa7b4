"""glibc's allocator, set so that it keeps what a step frees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loraplus_hydra.training import allocator

# Takes and frees blocks of 48 MB, which glibc maps anew each time, and prints how many pages fault in after a while.
_SCRIPT = """
import resource, sys
from loraplus_hydra.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() and keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for index in range(20):
    bytearray(b"x") * (48 * 2**20)
    if index == 10:
        before = faults()
print(faults() - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", _SCRIPT, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    assert faults("keep") < faults("leave") / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.os, "confstr", {}.get)
    assert allocator.keep_freed_memory() is False

    def unknown(name: str) -> str:
        raise ValueError(name)

    monkeypatch.setattr(allocator.os, "confstr", unknown)
    assert allocator.keep_freed_memory() is False
