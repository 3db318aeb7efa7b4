"""Commands in forked processes, for trials by the hundred: what they need is imported once.

Each module of trials runs as a script in a process of its own, `python -m tests.fuzz.NAME FOLDER FIRST COUNT
OVERRIDES...`, because a process with threads can't be forked. It prints a line of JSON for each trial.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.forking import start
from tests.support.processes import IMPORTED

ROOT = Path(__file__).resolve().parents[2]
FIRST = int(os.environ.get("LORAPLUS_FUZZ_FROM", "0"))  # number of the first trial, which seeds its generator
COUNT = int(os.environ.get("LORAPLUS_FUZZ_COUNT", "0"))  # 0: as many as each test has by itself
SECONDS = 30  # of processor time that a command may take
_PATIENCE = 150  # seconds of a clock: on a busy machine a command waits, and one that hangs takes no processor time
_ROOM = 3 * 2**30  # bytes beyond which a command is killed, to protect the machine
_READ = 2**26  # bytes: larger files are compared by size and time
UNEXPECTED = ("Traceback (most recent call last)", "HYDRA_FULL_ERROR", "Fatal Python error")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it took."""

    status: int  # 128 + the signal's number for one that was killed
    output: str
    seconds: float  # of processor time
    memory: int  # bytes at the peak that are not of a file

    def fault(self) -> str:
        """What no command may do; empty for one that worked, or ended as a listed error."""
        if self.status not in (0, 1):
            return f"exit status {self.status}: {self.output[-1500:]}"
        if self.seconds > SECONDS:
            return f"it took {self.seconds:.0f} s"
        if any(text in self.output for text in UNEXPECTED):
            return f"an unexpected error: {self.output[-1500:]}"
        if self.status and not re.search(r"^(\d+ errors?:|Error: )", self.output, re.MULTILINE):
            return f"an error without a message: {self.output[-1500:]}"
        return ""


def prepare() -> None:
    """Import what all commands need, and leave the collector nothing to walk in the children."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def command(arguments: list[str], folder: Path) -> Ended:
    """Run the command line in `folder`, in a forked process with limits."""
    log = folder.parent / "command.log"
    log.unlink(missing_ok=True)
    child = start(arguments, log, prepare=lambda: _limit(folder))
    deadline, memory = time.monotonic() + _PATIENCE, 0
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        memory = max(memory, _memory(child))
        if time.monotonic() > deadline or memory > _ROOM:
            os.kill(child, signal.SIGKILL)
            deadline += _PATIENCE
        time.sleep(0.005)
    _, status, used = ended
    code = os.waitstatus_to_exitcode(status)
    output = log.read_text(encoding="utf-8", errors="replace")
    return Ended(code if code >= 0 else 128 - code, output, used.ru_utime + used.ru_stime, memory)


def driven(module: str, folder: Path, count: int, *overrides: str) -> list[dict[str, Any]]:
    """What a module of trials saw: `count` trials from LORAPLUS_FUZZ_FROM on."""
    print(f"{module}: {count} trials from LORAPLUS_FUZZ_FROM={FIRST}")
    command = [sys.executable, "-m", f"tests.fuzz.{module}", str(folder), str(FIRST), str(count), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    told = folder / "trials.jsonl"  # a file, so that a driver that dies loses no trial
    with told.open("w") as lines:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=lines, check=False)
    seen = [json.loads(line) for line in told.read_text().splitlines() if line.startswith("{")]
    assert done.returncode == 0, (seen[-1:], [trial for trial in seen if trial.get("fault")])
    assert len(seen) == count
    return seen


def trials(examine: Callable[[Path, list[str]], Callable[[int], dict[str, Any]]]) -> None:
    """Run the script of a module of trials; `examine` prepares a folder and returns the function of one trial."""
    folder, first, count, *overrides = sys.argv[1:]
    prepare()
    one = examine(Path(folder), overrides)
    for number in range(int(first), int(first) + int(count)):
        print(json.dumps({"number": number, **one(number)}, default=str), flush=True)


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Kind, size, time and content of everything in a folder; links are not followed."""
    return dict(_entries(folder))


def _entries(folder: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    places = [folder]  # not rglob, which recurses: some of these folders are a thousand levels deep
    while places:
        for entry in os.scandir(places.pop()):
            path, found = Path(entry.path), entry.stat(follow_symlinks=False)
            regular = entry.is_file(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                places.append(path)
            # A huge file of zeros takes no room on the disk, but all of the memory
            small = regular and found.st_size <= _READ
            content = path.read_bytes() if small else str(path.readlink()) if path.is_symlink() else found.st_size
            yield str(path.relative_to(folder)), (found.st_mode, found.st_mtime_ns if regular else 0, content)


def _memory(pid: int) -> int:
    # Pages of a file don't count: the system takes them back when it needs them.
    fields = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()
    return int(fields[0]) * 1024 if fields else 0


def _limit(folder: Path) -> None:
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (3 * SECONDS, 3 * SECONDS))
