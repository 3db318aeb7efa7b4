"""The axes of heatmap.png, its lines of equal alpha and equal eta_B, and the room that they leave to the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from loraplus_hydra.report.figures import rates, style
from loraplus_hydra.report.figures.plane import Plane, plane_of
from loraplus_hydra.report.formatting import short
from loraplus_hydra.report.results import SweepResults, results_of
from tests.support.finished_sweeps import loss_of, write_job

FIVE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
EQUAL_RUN = "lora_alpha of the equal run of plain LoRA, with lr = η_A"


def sweep(folder: Path, first: Mapping[str, Sequence[Any]], **others: Any) -> SweepResults:
    """A sweep over the values of `first`; each key of `others` is the same for all jobs."""
    for place, values in enumerate(itertools.product(*first.values())):
        job = {**dict(zip(first, values, strict=True)), **others}
        lr_A = job.get("loraplus.lr_A", job.get("optimizer.lr"))
        lr_B = job.get("loraplus.lr_B", lr_A * job.get("loraplus.ratio", 1))
        write_job(folder / str(place), job, loss_of(lr_A, lr_B))
    return results_of(folder)


def drawn(results: SweepResults) -> tuple[Any, style.Picture]:
    with matplotlib.rc_context(style.SETTINGS):
        picture = rates.draw(results)
        assert picture is not None
        picture.figure.canvas.draw()
    return picture.figure.axes[0], picture


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_grid_of_both_rates_has_the_equal_runs_alpha_on_diagonals(tmp_path: Path) -> None:
    axes, picture = drawn(sweep(tmp_path, {"loraplus.lr_A": FIVE, "loraplus.lr_B": FIVE}))
    assert EQUAL_RUN in texts(axes)
    # alpha x eta_B / eta_A along the top row, then down the last column
    alphas = [16 * rate / 1e-2 for rate in FIVE] + [16 * 1e-2 / rate for rate in FIVE[-2::-1]]
    labels = [text for text in texts(axes) if text in {short(alpha) for alpha in alphas}]
    assert labels == [short(float(f"{alpha:.4g}")) for alpha in alphas]
    assert "lr = η_A and the lora_alpha at the end of its line" in picture.caption


def test_grid_of_lr_and_ratio_has_alpha_at_the_top_and_lines_of_equal_eta_b(tmp_path: Path) -> None:
    lrs, ratios = (1e-4, 2e-4, 4e-4), (1, 2, 4, 8)
    axes, picture = drawn(sweep(tmp_path, {"optimizer.lr": lrs, "loraplus.ratio": ratios}))
    assert picture.title == "Both rates: η_A x ratio"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\nplain LoRA", "2", "4", "8"]
    (top,) = axes.child_axes
    assert top.get_xlabel() == EQUAL_RUN
    assert [label.get_text() for label in top.get_xticklabels()] == ["16", "32", "64", "128"]
    assert {"1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3", "3.2e-3"} <= set(texts(axes))


def test_unequal_steps_have_a_second_text_instead_of_lines(tmp_path: Path) -> None:
    axes, _ = drawn(sweep(tmp_path / "a", {"optimizer.lr": (5e-4, 2e-3), "loraplus.ratio": (1, 2, 4)}))
    assert {"η_B 5e-4", "η_B 1e-3", "η_B 8e-3"} <= set(texts(axes))
    pairs = {"loraplus.lr_A": (1e-6, 5e-6, 1e-5), "loraplus.lr_B": (1e-6, 5e-6, 1e-5)}
    axes, picture = drawn(sweep(tmp_path / "b", pairs))
    assert {"alpha 16", "alpha 160", "alpha 1.6"} <= set(texts(axes))
    assert "the lora_alpha in it" in picture.caption


def test_points_have_alpha_beside_the_ratio(tmp_path: Path) -> None:
    for place, (lr, ratio) in enumerate(((1e-4, 1), (3e-4, 2), (7e-4, 5), (2e-3, 11))):
        write_job(tmp_path / str(place), {"optimizer.lr": lr, "loraplus.ratio": ratio}, loss_of(lr, lr * ratio))
    axes, picture = drawn(results_of(tmp_path))
    assert "ratio 5\nalpha 80" in texts(axes)
    assert "Each point is nearly the same training" in picture.caption


@pytest.mark.parametrize(
    "other",
    [
        {"adapter.init_lora_weights": "a_zero"},
        {"adapter.init_lora_weights": "pissa"},
        {"adapter._target_": "peft.AdaLoraConfig"},
        {"optimizer._target_": "torch.optim.SGD"},
    ],
)
def test_no_alpha_without_a_known_equal_run(tmp_path: Path, other: Mapping[str, Any]) -> None:
    results = sweep(tmp_path, {"loraplus.lr_A": FIVE[:3], "loraplus.lr_B": FIVE[:3]}, **other)
    assert plane_of(results.settings).alpha is None
    axes, picture = drawn(results)
    assert EQUAL_RUN not in texts(axes)
    assert "lora_alpha" not in picture.caption


@pytest.mark.parametrize("keys", [("loraplus.lr_A", "loraplus.lr_B"), ("optimizer.lr", "loraplus.ratio")])
def test_no_line_crosses_a_number(tmp_path: Path, keys: tuple[str, str]) -> None:
    values = FIVE if keys[1] == "loraplus.lr_B" else (1, 3, 10, 30, 100)
    axes, _ = drawn(sweep(tmp_path, {keys[0]: FIVE, keys[1]: values}))
    # Rings lie around cells, and the legend's lines are not in the axes
    lines = max(line.get_zorder() for line in axes.get_lines() if line.get_marker() in ("None", "", None))
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    grounds = [patch for patch in patches if patch.get_zorder() > lines and to_hex(patch.get_facecolor()) != "#000000"]
    numbers = [text for text in axes.texts if text.get_zorder() == 6]
    assert len(numbers) == 25
    for number in numbers:
        box = number.get_window_extent()
        assert any(
            ground.get_window_extent().contains(*box.p0) and ground.get_window_extent().contains(*box.p1)
            for ground in grounds
        ), number.get_text()


@given(
    st.lists(st.floats(1e-6, 1e-1), min_size=2, max_size=6, unique_by=lambda value: f"{value:.2e}"),
    st.lists(st.floats(1e-6, 1e-1), min_size=2, max_size=6, unique_by=lambda value: f"{value:.2e}"),
    st.booleans(),
)
def test_lines_run_through_the_cells_with_their_value(first: list[float], second: list[float], by_ratio: bool) -> None:
    plane = Plane(by_ratio, {(x, y): [] for x in first for y in second}, None)
    for across, x in enumerate(plane.across.values):
        for up, y in enumerate(plane.up.values):
            line = plane.line_of_eta_b(x * y) if by_ratio else plane.line_of_ratio(x / y)
            at = numpy.argmin(numpy.abs(line[0] - across) + numpy.abs(line[1] - up))
            assert line[:, at] == pytest.approx((across, up), abs=1e-6)
            assert line.min() >= -0.5 - 1e-6
            assert (line.max(axis=1) <= (len(first) - 0.5 + 1e-6, len(second) - 0.5 + 1e-6)).all()
