"""Processes forked from one that has imported the libraries, because each import of them takes many seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

IMPORTED = (
    *("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "matplotlib.figure"),
    *(
        "loraplus_hydra.cli.main",
        "loraplus_hydra.runs.job",
        "loraplus_hydra.training.hf_trainer.assemble",
        "loraplus_hydra.check.dry_run",
        "loraplus_hydra.tasks.examples",
    ),
)
SECONDS = 1200  # no process may take longer

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload([*IMPORTED])


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a process; of several, the first status that is not zero."""

    status: int
    out: str


def command_line(*arguments: str) -> None:
    """Run the command line in this process."""
    from loraplus_hydra.cli.main import main

    sys.argv = ["loraplus-hydra", *arguments]
    main()


def start(function: Callable[..., None], *arguments: Any, folder: Path, log: Path, **environment: str) -> BaseProcess:
    """Start a process that calls `function` in `folder`; what it prints is appended to `log`."""
    settings = {**os.environ, **environment}
    process = _forkserver.Process(target=_call, args=(function, arguments, str(folder), str(log), settings))
    process.start()
    return process


def run(function: Callable[..., None], *arguments: Any, folder: Path, **environment: str) -> Ended:
    """Call `function` in `folder`, in a process of its own, and wait for its end."""
    log = folder / f"{time.monotonic_ns()}.log"
    process = start(function, *arguments, folder=folder, log=log, **environment)
    return _ended([process], log)


def run_in_two_ranks(function: Callable[..., None], *arguments: Any, folder: Path) -> Ended:
    """Call `function` in two processes, with the environment that torchrun gives them, and wait for their ends."""
    log = folder / f"{time.monotonic_ns()}.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(function, *arguments, folder=folder, log=log, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]
    return _ended(ranks, log)


def _call(
    function: Callable[..., None], arguments: tuple[Any, ...], folder: str, log: str, environment: dict[str, str]
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    function(*arguments)


def _ended(processes: list[BaseProcess], log: Path) -> Ended:
    until = time.monotonic() + SECONDS
    try:
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > until:
                for process in processes:  # the others would wait for it
                    process.join(timeout=10)
                break
            processes[0].join(timeout=0.05)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()
    output = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    return Ended(next((process.exitcode for process in processes if process.exitcode), 0), output)


def in_own_session(words: list[str], place: Path) -> subprocess.Popen[str]:
    """Start the command line in a process of its own session, so that signals reach it alone."""

    def hear_ctrl_c() -> None:  # a shell's background jobs and their children ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [sys.executable, "-m", "loraplus_hydra", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
