"""Ten thousand steps: memory stays flat, and metrics.jsonl can be read at any moment while it grows."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10_000


def resident(process: int) -> int:
    """KiB that a process has in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="there is no /proc")
def test_memory_is_flat_and_metrics_are_readable_at_any_moment(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [f"trainer.max_steps={STEPS}", "trainer.logging_steps=5", "trainer.save_steps=1000"]
    overrides += ["trainer.per_device_train_batch_size=1", "trainer.eval_steps=0.25", "hydra.run.dir=run"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "loraplus_hydra", *tiny_run, *overrides],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    metrics = tmp_path / "run" / "metrics.jsonl"
    seen: list[tuple[int, int]] = []  # step and memory
    while process.poll() is None:
        if metrics.is_file():
            # Linux may show a write page by page, so the last line can be incomplete for a moment.
            text, _, _ = metrics.read_text(encoding="utf-8").rpartition("\n")
            lines = [json.loads(line) for line in text.splitlines()]
            try:
                seen += [(line["step"], resident(process.pid)) for line in lines[-1:]]
            except (FileNotFoundError, StopIteration):  # it has ended meanwhile
                break
        time.sleep(0.2)
    assert process.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    logged = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert logged == [1, *range(5, STEPS + 1, 5)]
    early = [memory for step, memory in seen if STEPS // 10 <= step < STEPS // 4]
    late = [memory for step, memory in seen if STEPS * 3 // 4 <= step < STEPS]
    assert len(early) > 20
    assert len(late) > 20
    assert statistics.median(late) < 1.03 * statistics.median(early)
