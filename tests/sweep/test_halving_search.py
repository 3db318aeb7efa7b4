"""A search reads its jobs' files: which jobs are compared at a rung, and which leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.io import job_status
from loraplus_hydra.io.job_status import JobStatus
from loraplus_hydra.io.result import Result
from loraplus_hydra.io.rungs import Rung, add_rung
from loraplus_hydra.sweep.halving_search import Search

START = "start"
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes what a job leaves: its status, and its loss at a rung at step 6 of 24."""

    def write_job(*overrides: str, status: str = job_status.WAITING, loss: float | None = 2.0, rows: str = "") -> None:
        name = "_".join(overrides)
        job_status.write(tmp_path, START, JobStatus(name, status, overrides=overrides))
        (tmp_path / name).mkdir()
        Result(status, "eval_loss", inputs={"data.eval": rows} if rows else {}).write(tmp_path / name)
        if loss is not None:
            add_rung(tmp_path / name, Rung(0.25, 6, 24, 6, (loss, loss), (1.0, 1.0)))

    return write_job


def search(folder: Path, *jobs: tuple[str, ...]) -> Search:
    found = Search(jobs, folder, START, greater_is_better=False)
    found.steps = 24
    return found


@pytest.mark.parametrize("loss", [2.0, None])
def test_a_failed_job_leaves_also_if_an_earlier_start_was_at_the_rung(
    loss: float | None, write: Write, tmp_path: Path
) -> None:
    write("ratio=1", loss=3.0)
    write("ratio=4", status=job_status.FAILED, loss=loss)
    found = search(tmp_path, ("ratio=1",), ("ratio=4",))
    found.arrive(6)
    assert found.remaining == ["ratio=1"]
