"""Figures of a report: their room, their scales and their removal."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.report.limits import robust_limits
from loraplus_hydra.report.results import results_of
from loraplus_hydra.report.write import write_report
from tests.support.finished_sweeps import ratio_sweep, write_job


def test_figures_have_room_for_runs_that_differ_in_many_keys(tmp_path: Path) -> None:
    """No label is cut off, and no axis's heading overlaps the next."""
    import warnings

    import matplotlib

    from loraplus_hydra.report import figures
    from loraplus_hydra.report.figures.style import SETTINGS

    for place in range(6):
        job = {
            "loraplus.ratio": (1, 4, 16)[place % 3],
            "optimizer.lr": (5e-5, 1e-4)[place % 2],
            "adapter.r": (4, 8)[place // 3],
            "model.path": f"/home/somebody/models/with/long/names/{place % 4}/llama-3-tiny",
            "data.train": f"/data/a/folder/with/a/long/name/rows-{(place + 1) % 4}.jsonl",
            "trainer.max_steps": 100 + place % 5,
            "trainer.per_device_train_batch_size": 8 + (place + 2) % 5,
            "trainer.gradient_accumulation_steps": 1 + (place + 1) % 3,
        }
        write_job(tmp_path / str(place), job, 3.5 + 0.01 * place)
    results = results_of(tmp_path)
    assert len(results.compared) >= 7
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {picture.name: picture.figure for picture in figures.draw_all(results)}
        for figure in drawn.values():
            figure.canvas.draw()
    assert set(drawn) >= {"settings", "curves", "keys"}
    texts = [*drawn["settings"].axes[0].get_yticklabels(), *drawn["curves"].legends[0].get_texts()]
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text.get_text()
        assert box.x1 <= text.figure.bbox.width, text.get_text()
    heads = [text.get_window_extent() for text in drawn["keys"].axes[0].texts if text.get_fontweight() == "bold"]
    assert len(heads) == len(results.compared) + 1
    assert all(one.x1 <= other.x0 for one, other in pairwise(heads))


def test_figures_that_no_longer_suit_are_removed(tmp_path: Path) -> None:
    ratio_sweep(tmp_path, {(1, 0): 3.7, (4, 0): 3.6})
    write_report(tmp_path)
    assert (tmp_path / "ratio.png").exists()
    for name in ("1_0", "4_0"):
        (tmp_path / name / "result.json").write_text("{}")
    write_report(tmp_path)
    assert not (tmp_path / "ratio.png").exists()


def test_diverged_value_leaves_the_scale_to_the_others() -> None:
    low, high, beyond = robust_limits([3.6, 3.61, 3.65, 3.7, 3.8, 3.72, 3.66, 3.9, 3.63, 3.64, 4e7])
    assert (low, high, beyond) == (3.6, 3.9, 1)
    assert robust_limits([1.0, 1.0, 1.0]) == (1.0, 1.0, 0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_scale_lies_within_the_values(values: list[float]) -> None:
    low, high, beyond = robust_limits(values)
    assert low in values
    assert high in values
    assert beyond == sum(not low <= value <= high for value in values)
