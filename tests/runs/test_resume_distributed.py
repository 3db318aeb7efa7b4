"""Several processes: a run that is killed goes on to the same numbers, and no process waits for a dead one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.forking import differences, unfinished_checkpoint, unreadable

ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    *("trainer=cpu", "trainer.max_steps=30", "trainer.per_device_train_batch_size=2", "trainer.logging_steps=7"),
    *("trainer.save_steps=5", "trainer.eval_steps=10", "adapter.lora_dropout=0.1"),
    "trainer.gradient_accumulation_steps=2",
)


def started(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "-m", "loraplus_hydra", *arguments],
            cwd=log.parent,
            env=environment,
            stdout=file,
            stderr=file,
        )


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes that torchrun has started; each is in a session of its own."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "it ended before"
        time.sleep(0.001)


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_bits_of_two_that_are_not(
    tiny_run: list[str], tmp_path: Path
) -> None:
    overrides, log = [*tiny_run, *SHARED], tmp_path / "log"
    assert started(*overrides, "hydra.run.dir=unbroken", log=log).wait() == 0, log.read_text()[-3000:]
    process = started(*overrides, "hydra.run.dir=run", log=log)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "checkpoint-10").is_dir(), process)
    wait_for(
        lambda: unfinished_checkpoint(tmp_path / "run") or "15" in str(list(tmp_path.glob("run/checkpoints/*"))),
        process,
    )
    for child in [*children(process), process.pid]:
        os.kill(child, signal.SIGKILL)
    process.wait()
    assert unreadable(tmp_path / "run") == []
    assert started("resume", "run", log=log).wait() == 0, log.read_text()[-3000:]
    assert differences(tmp_path / "run", tmp_path / "unbroken") == []
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_at"][0] >= 5


@pytest.mark.slow
def test_process_that_dies_ends_the_other_with_a_message(tiny_run: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = started(*tiny_run, *SHARED, "trainer.max_steps=100000", "hydra.run.dir=run", log=log)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "checkpoint-5" / "manifest.json").is_file(), process)
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    assert "Signal 9 (SIGKILL)" in log.read_text()
    assert unreadable(tmp_path / "run") == []


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint_of_one_step(tiny_run: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = started(*tiny_run, *SHARED, "trainer.max_steps=100000", "hydra.run.dir=run", log=log)
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "checkpoint-5" / "manifest.json").is_file(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) != 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{result['steps']}" / "manifest.json").is_file()
