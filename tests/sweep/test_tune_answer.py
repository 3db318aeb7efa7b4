"""The files of an answer of `tune`, for searches made by hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.io import job_status
from loraplus_hydra.io.job_status import JobStatus
from loraplus_hydra.io.rungs import Rung
from loraplus_hydra.sweep.halving_search import Search
from loraplus_hydra.sweep.tune_answer import Answer, write_answer
from loraplus_hydra.sweep.tuning import LR, RATIO, Settings, candidates

COMMAND = "python -m loraplus_hydra hparams_search=tune 'tune.eta_B=[1e-3,2e-3,4e-3]' tune.seeds=2 tune.budget=3"


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that compares two finalists at half of 40 steps, and returns tune.json.

    No rung is before step 20. The candidate with the largest of three rates has the lower loss and the greater metric.
    """

    def written(
        metrics: tuple[float | None, float | None] = (None, None), ratios: Sequence[float] = (1,)
    ) -> dict[str, Any]:
        pairs = candidates([1e-3, 2e-3, 4e-3], ratios)
        settings = Settings((LR, RATIO), tuple(pairs), (0, 1), 3.0, "eval_accuracy", True, "default")
        jobs = [(*settings.overrides(one), "seed=0") for one in pairs]
        search = Search(jobs, tmp_path, "start", greater_is_better=True)
        search.steps, search.earliest = 40, 20
        for job in jobs:
            (tmp_path / f"job-{job[0]}").mkdir(exist_ok=True)
            job_status.write(tmp_path, "start", JobStatus(f"job-{job[0]}", job_status.WAITING, overrides=job))
        (tmp_path / "sweep.json").write_text(json.dumps({"command": COMMAND}))
        named = dict(zip(search.candidates, pairs, strict=True))
        finalists = {
            name: [Rung(0.5, 20, 40, 20, (loss + seed / 100,), (1.0,), metric) for seed in (0, 1)]
            for name, loss, metric in zip(list(named)[-2:], (3.0, 2.0), metrics, strict=True)
        }
        answer = Answer(settings, named, search)
        search.keep(answer.decide(20, finalists))
        write_answer(answer)
        found: dict[str, Any] = json.loads((tmp_path / "tune.json").read_text())
        return found

    return written


def test_the_extended_search_has_the_budget_that_its_rungs_need(told: Callable[..., dict[str, Any]]) -> None:
    """All rungs are at step 20 of 40: 4 candidates, 2 finalists' second seed, and the winner's second half."""
    words = shlex.split(told()["extend"])
    assert "tune.eta_B=[1e-3,2e-3,4e-3,8e-3]" in words
    assert f"tune.budget={4 * 0.5 + 2 * 0.5 + 0.5:g}" in words


@pytest.mark.parametrize(
    ("metrics", "compared_by", "greater_is_better"),
    [((0.25, 0.5), "eval_accuracy", True), ((None, None), "eval_loss", False), ((0.25, None), "eval_loss", False)],
)
def test_the_direction_is_that_of_what_is_compared(
    metrics: tuple[float | None, float | None],
    compared_by: str,
    greater_is_better: bool,
    told: Callable[..., dict[str, Any]],
) -> None:
    found = told(metrics)
    assert (found["compared_by"], found["greater_is_better"]) == (compared_by, greater_is_better)
    assert found["winner"]["eta_B"] == 4e-3


def test_the_answer_names_its_command_and_the_winners_job(told: Callable[..., dict[str, Any]]) -> None:
    found = told()
    assert found["command"] == COMMAND
    assert found["winner"]["job"] == "job-optimizer.lr=0.004"


@pytest.mark.parametrize(
    ("ratios", "following"), [((0.25, 0.5, 1), "2"), ((1, 2, 4), "8"), ((0.25, 0.5), "1"), ((1,), None)]
)
def test_the_largest_ratio_is_an_edge(
    ratios: Sequence[float], following: str | None, told: Callable[..., dict[str, Any]]
) -> None:
    found = told(ratios=ratios)
    assert found["winner"]["ratio"] == max(ratios)
    edge = f"At the grid's edge: ratio {max(ratios):g} is the largest value. Extend to {following}."
    assert [text for text in found["answer"] if "edge: ratio" in text] == ([edge] if following else [])
    assert not following or f"{ratios[-1]:g},{following}]" in found["extend"]


def test_files_of_the_user_stay_beside_the_winners(told: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("seed: 3\n")
    told()
    assert (tmp_path / "experiment" / "mine.yaml").read_text() == "seed: 3\n"
    assert "lr: 0.004" in (tmp_path / "experiment" / "tuned.yaml").read_text()
