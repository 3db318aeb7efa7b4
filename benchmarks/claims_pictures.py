"""The study's pictures, from its log alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

from benchmarks.claims_log import Grid, Setting
from benchmarks.claims_tables import PLAIN, has_runs, ordered, picture_of
from loraplus_hydra.report.figures import style
from loraplus_hydra.report.formatting import short
from loraplus_hydra.report.limits import padded, robust_limits

_MARKERS = "osD^vP"  # in addition to colours, for readers with any colour vision
_BEGINNING = 0.25  # share of the steps at which a curve is so steep that it would flatten the rest


def write_pictures(grids: Sequence[Grid], folder: Path) -> None:
    """Write a picture of each grid with runs into `folder`."""
    with matplotlib.rc_context(style.SETTINGS):
        for grid in filter(has_runs, grids):
            (folder / picture_of(grid)).write_bytes(style.png(draw(grid)))


def draw(grid: Grid) -> Any:
    """Return a figure with three panels: all rates, each ratio's best rate, and its curve."""
    figure = style.new_figure(11.4, 4.0)
    panels = figure.subplots(1, 3, width_ratios=(5, 3, 4))
    for axes, panel in zip(panels, (_draw_rates, _draw_best, _draw_curves), strict=True):
        panel(axes, grid)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel(grid.metric)
    looks = _looks(grid)
    handles = [Line2D([], [], label=f"ratio {short(ratio)}", **looks[ratio]) for ratio, _ in ordered(grid)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _looks(grid: Grid) -> dict[float, dict[str, Any]]:
    """Return colour and marker of each ratio. Plain LoRA has the colour of a baseline."""
    ratios = sorted(grid.ratios)
    colours = [style.BASELINE, *style.ordered_colours(len(ratios) - 1)]
    looks = zip(ratios, colours, _MARKERS, strict=False)
    return {ratio: {"color": colour, "marker": marker, "markersize": 5} for ratio, colour, marker in looks}


def _bar(axes: Any, points: dict[float, Sequence[float]], look: dict[str, Any], **other: Any) -> None:
    """Draw means with a bar of one standard deviation over the seeds, and none for one seed."""
    means = [statistics.mean(values) for values in points.values()]
    bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in points.values()]
    axes.errorbar(list(points), means, yerr=bars, **look, **other, capsize=3)


def _draw_rates(axes: Any, grid: Grid) -> None:
    every: list[float] = []
    for ratio, look in _looks(grid).items():
        found = {lr: values for lr in grid.rates if (values := grid.values(lr, ratio)) and math.isfinite(sum(values))}
        every += [value for values in found.values() for value in values]
        _bar(axes, found, look)
    axes.set_ylim(*padded(*robust_limits(every)[:2]))
    axes.set_xscale("log")
    style.log_ticks(axes.xaxis, grid.rates)
    axes.set_xlabel("rate of lora_A (log)")
    axes.set_title("all rates")


def _draw_best(axes: Any, grid: Grid) -> None:
    for ratio, lr in ordered(grid):
        values = grid.values(lr, ratio)
        if math.isfinite(sum(values)):
            _bar(axes, {ratio: values}, _looks(grid)[ratio])
    axes.set_xscale("log", base=2)
    style.log_ticks(axes.xaxis, grid.ratios)
    axes.set_xlabel("ratio (log)")
    axes.set_title("best rate of each ratio")


def _draw_curves(axes: Any, grid: Grid) -> None:
    shown: list[float] = []
    for ratio, lr in ordered(grid):
        runs = [grid.runs.get(Setting(lr, ratio, seed)) for seed in grid.seeds]
        curves = [run["curve"] for run in runs if run and run["status"] == "ok"]
        points = [(each[0][0], statistics.mean(value for _, value in each)) for each in zip(*curves, strict=True)]
        axes.plot(*zip(*points, strict=True), **_looks(grid)[ratio])
        shown += [value for step, value in points if step >= _BEGINNING * points[-1][0]]
        if ratio == PLAIN:
            axes.axhline(points[-1][1], color=style.BASELINE, linestyle=":", zorder=1)
    axes.set_ylim(*padded(min(shown), max(shown)))
    axes.set_xlabel("step")
    axes.set_title("curves of the best rates")
