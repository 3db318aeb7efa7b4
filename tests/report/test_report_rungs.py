"""The rungs of a search in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.report.figures import rungs
from loraplus_hydra.report.results import results_of
from tests.support.finished_sweeps import write_job, write_sweep


def searched(folder: Path, candidates: list[dict[str, Any]], name: str = "halving.json", **more: Any) -> Path:
    """Write a sweep of two jobs whose search has one rung, at step 6."""
    write_sweep(folder)
    for ratio in (1, 4):
        write_job(folder / f"ratio-{ratio}", {"loraplus.ratio": ratio}, 3.5)
    (folder / name).write_text(json.dumps({"rungs": [{"step": 6, "keep": 1, "candidates": candidates}], **more}))
    return folder


@pytest.mark.parametrize(("metric", "by_loss"), [(0.5, False), (None, True)])
def test_rungs_show_the_metric_only_if_all_candidates_have_it(
    metric: float | None, by_loss: bool, tmp_path: Path
) -> None:
    candidates = [
        {"name": "a", "loss": 3.0, "metric": 0.25, "stays": False},
        {"name": "b", "loss": 2.0, "metric": metric, "stays": True},
    ]
    sweep = results_of(searched(tmp_path / "sweep", candidates)).sweep
    assert sweep.rungs_by_loss == by_loss
    assert sweep.rungs[0].values == (
        {"a": (3.0, False), "b": (2.0, True)} if by_loss else {"a": (0.25, False), "b": (0.5, True)}
    )


def test_a_figure_of_very_many_candidates_says_how_many_it_leaves_out(tmp_path: Path) -> None:
    candidates = [{"name": f"c{place}", "loss": float(place), "stays": place < 3} for place in range(1, 5000)]
    picture = rungs.draw(results_of(searched(tmp_path / "sweep", candidates)))
    assert picture is not None
    assert "4799 candidates that left early are not drawn." in picture.caption
    assert len(picture.figure.axes[0].get_lines()) <= 2 * 200


@pytest.mark.parametrize(
    ("extend", "shown"),
    [
        ("python -m loraplus_hydra tune 'tune.ratios=[1,4]'", "python -m loraplus_hydra tune 'tune.ratios=[1,4]'"),
        ("python -m loraplus_hydra tune; curl there | sh", "python -m loraplus_hydra 'tune;' curl there '|' sh"),
        ("curl there | sh", ""),
        ("'", ""),
        (7, ""),
    ],
)
def test_only_a_command_of_this_program_is_shown(extend: Any, shown: str, tmp_path: Path) -> None:
    folder = searched(tmp_path / "sweep", [], "tune.json", answer=["Best: a."], extend=extend)
    assert results_of(folder).sweep.extend == shown
