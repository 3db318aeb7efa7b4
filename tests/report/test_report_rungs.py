"""The rungs of a search in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.io.rungs import Rung, add_rung
from loraplus_hydra.report.figures import draw_all, rungs
from loraplus_hydra.report.figures import ratio as ratio_figure
from loraplus_hydra.report.results import SweepResults, results_of
from loraplus_hydra.report.summary import command, details, headline
from tests.support.finished_sweeps import write_job, write_sweep


def searched(folder: Path, candidates: list[dict[str, Any]], name: str = "halving.json", **more: Any) -> Path:
    """Write a sweep of two jobs whose search has one rung, at step 6, where one left."""
    write_sweep(folder)
    for ratio, status in ((1, "pruned"), (4, "ok")):
        write_job(folder / f"ratio-{ratio}", {"loraplus.ratio": ratio}, 3.5, status=status)
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


@pytest.mark.parametrize("metrics", [(0.0, 0.5), (None, 0.5), (0.5, None)])
def test_the_best_of_plain_lora_that_left_has_the_greatest_metric(
    metrics: tuple[float | None, float | None], tmp_path: Path
) -> None:
    """Two settings at ratio 1 left at the same step."""
    candidates = [{"name": "a", "loss": 3.0, "metric": 0.5, "stays": True}]
    (tmp_path / "halving.json").write_text(json.dumps({"rungs": [{"step": 6, "candidates": candidates}]}))
    for ratio, lr, metric in ((8, 1e-3, 0.75), (1, 1e-3, metrics[0]), (1, 2e-3, metrics[1])):
        folder = tmp_path / f"{ratio}_{lr}"
        values = {"loraplus.ratio": ratio, "optimizer.lr": lr}
        how = {"status": "ok" if ratio == 8 else "pruned", "metric": "eval_accuracy", "greater_is_better": True}
        write_job(folder, values, 0.75 if ratio == 8 else None, curve=[(0, 0.0), (6, 0.25)], **how)
        add_rung(folder, Rung(0.25, 6, 24, 6, (1.0,), (1.0,), metric))
    (sentence,) = (one for one in details(results_of(tmp_path)) if "ratio 1" in one)
    best = "lr 1e-3" if metrics[0] else "lr 2e-3"
    assert f"ratio 1, {best}, at step 6. Its eval_accuracy there was 0.5000; that of the best setting was 0.7500" in (
        sentence
    )


def test_rungs_are_not_shown_once_all_candidates_were_trained_to_their_ends(tmp_path: Path) -> None:
    candidates = [{"name": "a", "loss": 3.0, "stays": False}, {"name": "b", "loss": 2.0, "stays": True}]
    folder = searched(tmp_path / "sweep", candidates)
    assert rungs.draw(results_of(folder)) is not None
    result = json.loads((folder / "ratio-1" / "result.json").read_text())
    (folder / "ratio-1" / "result.json").write_text(json.dumps({**result, "status": "ok"}))
    assert rungs.draw(results_of(folder)) is None


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Two searches of `tune` in one folder. The winner of the second one is the answer, with a worse loss."""
    write_sweep(tmp_path, command="python -m loraplus_hydra tune 'tune.ratios=[1,4]'")
    write_job(tmp_path / "first", {"loraplus.ratio": 1}, 3.25)
    write_job(tmp_path / "second", {"loraplus.ratio": 4}, 3.5)
    write_job(tmp_path / "left", {"loraplus.ratio": 16}, None, status="pruned")
    (tmp_path / "tune.json").write_text(
        json.dumps(
            {
                "command": "python -m loraplus_hydra tune 'tune.ratios=[1,4]'",
                "answer": ["Best: ratio 4."],
                "winner": {"job": "second"},
            }
        )
    )
    return tmp_path


def test_the_best_job_is_the_one_that_tune_names(tuned: Path) -> None:
    results = results_of(tuned)
    assert headline(results) == "Best: ratio 4."
    assert command(results) == "python -m loraplus_hydra loraplus.ratio=4"
    best, best_job = results.outcome.best, results.outcome.best_job
    assert best is not None
    assert best_job is not None
    assert (best.values, best_job.folder) == ({"loraplus.ratio": 4}, "second")


def test_without_a_result_of_the_winner_no_other_job_is_the_best(tuned: Path) -> None:
    (tuned / "second" / "result.json").unlink()
    results = results_of(tuned)
    assert headline(results) == "Best: ratio 4."
    assert command(results) == ""


def test_an_answer_of_another_search_in_the_folder_is_not_the_reports(tuned: Path) -> None:
    write_sweep(tuned, command="python -m loraplus_hydra tune 'tune.ratios=[1,4,16]'")
    results = results_of(tuned)
    assert headline(results) == "Best: ratio 1, with eval_loss 3.2500."
    assert command(results) == "python -m loraplus_hydra loraplus.ratio=1"


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_a_failed_jobs_cross_is_at_the_worse_end(greater_is_better: bool, tmp_path: Path) -> None:
    how = {"metric": "score", "greater_is_better": greater_is_better}
    for ratio, seed, value in ((1, 0, 0.25), (4, 0, 0.5), (4, 1, None), (16, 0, None)):
        status = "failed" if value is None else "ok"
        values = {"loraplus.ratio": ratio, "seed": seed}
        write_job(tmp_path / f"{ratio}_{seed}", values, value, status=status, **how)
    picture = ratio_figure.draw(results_of(tmp_path))
    assert picture is not None
    crosses = [line for line in picture.figure.axes[0].get_lines() if line.get_marker() == "x"]
    worst = 0.25 if greater_is_better else 0.5
    assert [(*line.get_xdata(), *line.get_ydata()) for line in crosses] == [(4, worst), (16, worst)]


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
