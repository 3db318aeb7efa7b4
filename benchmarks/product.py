"""The product's command line in a process of its own, with its CPU time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys


def run(words: list[str], threads: int) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command of the product. Return its CPU seconds, everything included, and how it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "loraplus_hydra", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def failure(done: subprocess.CompletedProcess[str]) -> SystemExit:
    """Return an exception with the command and the end of its output."""
    return SystemExit(f"{' '.join(done.args)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
