"""A sweep that was stopped by Ctrl-C or kill -9 resumes when it is started again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.processes import in_own_session

SECONDS = 600  # no wait is longer


def stop_at_a_checkpoint(process: subprocess.Popen[str], place: Path, job: str, number: signal.Signals) -> str:
    """Send the signal once the job has a complete checkpoint. Returns the process's output."""
    until = time.monotonic() + SECONDS
    while not list(place.glob(f"outputs/sweeps/*/{job}_*/checkpoints/*/manifest.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no checkpoint came"
        time.sleep(0.01)
    process.send_signal(number)
    return "".join(process.communicate(timeout=SECONDS))


@pytest.mark.slow
def test_stopped_sweep_goes_on_where_it_was(tiny_run: list[str], tmp_path: Path) -> None:
    words = [
        "-m",
        *tiny_run,
        "seed=1,2,3",
        "task.samples=0",
        "trainer.max_steps=200",
        "trainer.save_steps=10",
        "trainer.eval_strategy=no",
    ]

    first = in_own_session(words, tmp_path)
    output = stop_at_a_checkpoint(first, tmp_path, "seed-1", signal.SIGINT)
    assert first.returncode == 130, output
    assert "1 of 3 jobs run: 1 interrupted" in output
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert (sweep / "report.html").is_file()
    (one,) = sweep.glob("seed-1_*")
    stopped = json.loads((one / "result.json").read_text())
    assert stopped["status"] == "interrupted"
    assert 10 <= stopped["steps"] < 200

    second = in_own_session(words, tmp_path)
    output = stop_at_a_checkpoint(second, tmp_path, "seed-2", signal.SIGKILL)
    assert second.returncode == -signal.SIGKILL, output
    done = (one / "result.json").read_bytes()
    assert json.loads(done)["status"] == "ok"
    assert json.loads(done)["steps"] == 200
    assert json.loads(done)["resumed_at"] == [stopped["steps"]]
    (two,) = sweep.glob("seed-2_*")
    assert not (two / "result.json").exists()

    third = in_own_session(words, tmp_path)
    output = "".join(third.communicate(timeout=SECONDS))
    assert third.returncode == 0, output
    assert "3 jobs: 2 done, 1 done before" in output
    assert (one / "result.json").read_bytes() == done
    assert json.loads((two / "result.json").read_text())["resumed_at"][0] >= 10
    results = [json.loads(path.read_text()) for path in sweep.glob("*/result.json")]
    assert [(result["status"], result["steps"]) for result in results] == [("ok", 200)] * 3
    assert not (sweep / ".jobs").exists()
