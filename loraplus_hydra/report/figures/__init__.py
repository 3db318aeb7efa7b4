"""The figures of a report, one module each."""

from __future__ import annotations

from collections.abc import Iterator

from loraplus_hydra.report.figures import curves, parallel, ranking, rates, ratio, rungs, signals
from loraplus_hydra.report.figures.style import Picture
from loraplus_hydra.report.results import SweepResults

NAMES = ("ratio", "heatmap", "rungs", "curves", "settings", "keys", "signals")


def draw_all(results: SweepResults, *, narrow: bool = False) -> Iterator[Picture]:
    """Yield the figures that suit the sweep, in the order of the page. `narrow` ones suit a phone."""
    # For a sweep over both rates the grid comes first, for other sweeps the ratio. A search by `tune` has one full run.
    first = (rates.draw, ratio.draw) if "loraplus.lr_B" in results.keys else (ratio.draw, rates.draw)
    compared = () if results.sweep.answer else first
    for draw in (*compared, rungs.draw, curves.draw, ranking.draw, parallel.draw, signals.draw):
        picture = draw(results, narrow=narrow)
        if picture is not None:
            assert picture.name in NAMES, picture.name
            yield picture
