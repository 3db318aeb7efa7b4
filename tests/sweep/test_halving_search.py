"""A search reads its jobs' files: which jobs are compared at a rung, and which leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import job_status
from loraplus_hydra.io.job_status import JobStatus
from loraplus_hydra.io.result import Result
from loraplus_hydra.io.rungs import Rung, add_rung
from loraplus_hydra.sweep.halving import plan
from loraplus_hydra.sweep.halving_search import Search

START = "start"
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes what a job leaves: its status, and its loss at a rung at step 6 of 24."""

    def write_job(
        *overrides: str, status: str = job_status.WAITING, loss: float | None = 2.0, rows: str = "", steps: int = 6
    ) -> None:
        name = "_".join(overrides)
        job_status.write(tmp_path, START, JobStatus(name, status, overrides=overrides))
        (tmp_path / name).mkdir()
        Result(status, "eval_loss", steps=steps, inputs={"data.eval": rows} if rows else {}).write(tmp_path / name)
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


def test_failed_jobs_cost_the_steps_that_they_took(write: Write, tmp_path: Path) -> None:
    """Rungs at steps 6 and 12 of 24. Two settings fail before the first, and one between the two, with a seed each."""
    write("ratio=1", "seed=0", steps=12)
    add_rung(tmp_path / "ratio=1_seed=0", Rung(0.5, 12, 24, 6, (2.0, 2.0), (1.0, 1.0)))
    write("ratio=1", "seed=1", steps=24, status=job_status.DONE)
    write("ratio=2", "seed=0", steps=2, status=job_status.FAILED, loss=None)
    write("ratio=2", "seed=1", steps=6)
    write("ratio=4", "seed=0", steps=0, status=job_status.FAILED, loss=None)
    write("ratio=4", "seed=1", steps=1, status=job_status.FAILED, loss=None)
    write("ratio=8", "seed=0", steps=9, status=job_status.FAILED)
    write("ratio=8", "seed=1", steps=0, status=job_status.FAILED)  # a resume that failed before its first step
    jobs = [(f"ratio={ratio}", f"seed={seed}") for ratio in (1, 2, 4, 8) for seed in (0, 1)]
    found = search(tmp_path, *jobs)
    job_status.write(tmp_path, START, JobStatus("ratio=8_seed=0", job_status.WAITING, overrides=jobs[6]))
    job_status.write(tmp_path, START, JobStatus("ratio=8_seed=1", job_status.WAITING, overrides=jobs[7]))
    found.plan(0.25, lambda steps, earliest: plan(4, steps, earliest))
    found.arrive(6)
    assert found.remaining == ["ratio=1", "ratio=8"]
    assert found.spent == (6 + 6) + (2 + 6) + (0 + 1) + (6 + 6)
    for job in jobs[6:]:
        job_status.write(tmp_path, START, JobStatus("_".join(job), job_status.FAILED, overrides=job))
    found.arrive(12)
    assert found.remaining == ["ratio=1"]
    assert found.spent == (12 + 12) + (2 + 6) + (0 + 1) + (9 + 6)


OTHER_ROWS = "the jobs have different held-out rows"


def test_as_many_other_rows_are_an_error_at_the_first_rung(write: Write, tmp_path: Path) -> None:
    write("fraction=0.1", rows="2 rows aaaa")
    write("fraction=0.2", rows="2 rows bbbb")
    found = search(tmp_path, ("fraction=0.1",), ("fraction=0.2",))
    with pytest.raises(UserError, match=OTHER_ROWS):
        found.plan(0.25, lambda steps, earliest: plan(2, steps, earliest))


def test_rows_may_differ_between_seeds_but_not_between_candidates(write: Write, tmp_path: Path) -> None:
    for ratio, seed, rows in ((1, 0, "a"), (1, 1, "b"), (4, 0, "a"), (4, 1, "b"), (16, 0, "a"), (16, 1, "c")):
        write(f"ratio={ratio}", f"seed={seed}", rows=f"2 rows {rows}")
    jobs = [(f"ratio={ratio}", f"seed={seed}") for ratio in (1, 4, 16) for seed in (0, 1)]
    assert list(search(tmp_path, *jobs[:4]).at_rung(6)) == ["ratio=1", "ratio=4"]
    with pytest.raises(UserError, match=OTHER_ROWS):
        search(tmp_path, *jobs).at_rung(6)


def test_rows_without_a_fingerprint_are_compared_by_their_number(write: Write, tmp_path: Path) -> None:
    write("ratio=1", rows="2 rows aaaa")
    write("ratio=4")
    assert list(search(tmp_path, ("ratio=1",), ("ratio=4",)).at_rung(6)) == ["ratio=1", "ratio=4"]


def test_of_two_entries_at_a_step_the_newer_one_is_compared(write: Write, tmp_path: Path) -> None:
    write("ratio=1", loss=3.0)
    add_rung(tmp_path / "ratio=1", Rung(0.3, 6, 24, 6, (1.0, 1.0), (1.0, 1.0)))
    ((found,),) = search(tmp_path, ("ratio=1",)).at_rung(6).values()
    assert found.loss == 1.0


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_seeds_are_of_one_candidate_however_they_are_written(plus: str, tmp_path: Path) -> None:
    jobs = [(f"ratio={ratio}", f"{plus}seed={seed}") for ratio in (1, 4) for seed in (0, 1)]
    assert search(tmp_path, *jobs).candidates == {"ratio=1": jobs[:2], "ratio=4": jobs[2:]}
