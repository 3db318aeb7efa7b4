"""The lock on a folder: refused to others, and gone with the process that held it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.checkpoints import MANIFEST
from loraplus_hydra.io.locks import folder_lock, is_locked
from tests.support.processes import command_line, start

ROOT = Path(__file__).resolve().parents[2]


def held(folder: Path) -> bool:
    """Return True if another process holds `folder`."""
    try:
        with folder_lock(folder):
            return False
    except UserError:
        return True


HOLD = """
import os, sys, time
from pathlib import Path
from loraplus_hydra.io.checkpoints import MANIFEST
from loraplus_hydra.io.locks import folder_lock

with folder_lock(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_lock_ends_with_its_run_though_a_forked_worker_lives_on(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            assert held(tmp_path)
            process.kill()
            process.wait()
            os.kill(worker, 0)  # it is still there
            assert not held(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)


def test_lock_outlasts_the_end_of_a_forked_process(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        done = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert "a run is active" in done.stderr


def test_lock_is_free_again_behind_its_block(tmp_path: Path) -> None:
    with folder_lock(tmp_path) as locked:
        assert locked
        assert held(tmp_path)
    assert not held(tmp_path)


def test_file_system_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock(tmp_path) as locked:
        assert not locked
        assert not held(tmp_path)
        assert is_locked(tmp_path) is None


def test_only_the_first_process_of_a_run_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_lock(tmp_path):
        monkeypatch.setenv("RANK", "1")
        assert not held(tmp_path)


def test_run_with_workers_is_unlocked_right_after_its_kill(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, "trainer.max_steps=100000", "trainer.save_steps=1", "trainer.dataloader_num_workers=2"]
    log = tmp_path / "log"
    process = start(command_line, *overrides, "hydra.run.dir=run", folder=tmp_path, log=log)
    try:
        end = time.monotonic() + 600
        while not (tmp_path / "run" / "checkpoints" / "checkpoint-1" / MANIFEST).is_file():
            assert process.is_alive(), log.read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert workers, "it has no workers"
    finally:
        process.kill()
        process.join()
    assert not held(tmp_path / "run")
    for worker in workers:
        with suppress(ProcessLookupError):  # it may have noticed that its parent has ended
            os.kill(int(worker), signal.SIGKILL)


def test_asking_for_a_lock_hinders_nobody(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is False
    with folder_lock(tmp_path):
        assert is_locked(tmp_path) is True
    assert is_locked(tmp_path / "gone") is False
    (tmp_path / "link").symlink_to(tmp_path)
    assert is_locked(tmp_path / "link") is False
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as another process that asks
    assert is_locked(tmp_path) is False
    threading.Timer(0.02, os.close, (handle,)).start()
    with folder_lock(tmp_path) as locked:
        assert locked
