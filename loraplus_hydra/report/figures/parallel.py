"""keys.png: parallel coordinates for sweeps of three or more keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from loraplus_hydra.report.figures.style import BEST, MUTED, NARROW, PAPER, Picture, new_figure, ordered_colour
from loraplus_hydra.report.formatting import clipped, folded, short
from loraplus_hydra.report.limits import robust_limits
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import order
from loraplus_hydra.report.values import identity, number

_MOST_KEYS = 8
_CHARACTERS = 110  # maximum number of characters of all axes' labels together
# Maximum number of values at equal distances; more values, as in a search, are drawn at their true places
_MOST_EVEN = 8
_NARROW_AXIS = 0.8  # inches for an axis on a phone, where the figure scrolls if it has more than four keys
_LINE_POINTS = 24  # number of points of the curve between two axes


def draw(results: SweepResults, *, narrow: bool = False) -> Picture | None:
    """Draw a line for each setting, from key to key to its metric."""
    keys = results.compared[:_MOST_KEYS]
    ranked = results.outcome.ranked
    if len(keys) < 3 or len(ranked) < 2:
        return None
    low, high, _ = robust_limits([one.mean for one in ranked if one.mean is not None])
    high = high if high > low else low + 1e-9
    figure = new_figure(max(NARROW, (len(keys) + 1) * _NARROW_AXIS) if narrow else 10.4, 4.4)
    axes = figure.add_subplot()
    width = round(_CHARACTERS / 10.4 * figure.get_figwidth()) // (len(keys) + 1)
    heights = [
        _axis(axes, column, results.names[key], [one.values.get(key) for one in ranked], width)
        for column, key in enumerate(keys)
    ]
    _metric_axis(axes, len(keys), results, low, high, width)
    for rank, one in reversed(list(enumerate(ranked))):
        # Lines with the same value are shifted a little, so that each line can be followed.
        offset = 0.05 * (rank / max(len(ranked) - 1, 1) - 0.5)
        path = [height(one.values.get(key)) + offset for height, key in zip(heights, keys, strict=True)]
        share = min(max(((one.mean or 0.0) - low) / (high - low), 0.0), 1.0)
        goodness = share if results.sweep.greater_is_better else 1 - share
        _line(axes, [*path, goodness], goodness, best=one is results.outcome.best)
    axes.set_xlim(-0.35, len(keys) + 0.35)
    axes.set_ylim(-0.12, 1.14)
    axes.set_axis_off()
    caption = _caption(results, len(keys), worst_beyond=_worst_beyond(results, low, high))
    return Picture("keys", "All varied keys at once", caption, figure)


def _line(axes: Any, heights: Sequence[float], goodness: float, *, best: bool) -> None:
    x, y = _smooth(heights)
    if best:
        axes.plot(x, y, color=PAPER, linewidth=6, zorder=3)
        axes.plot(x, y, color=BEST, linewidth=3, zorder=4)
    else:
        colour = ordered_colour(1 - 0.7 * goodness)  # from pink to blue
        look = {"alpha": 0.2 + 0.65 * goodness, "linewidth": 0.9 + goodness, "zorder": 1 + goodness}
        axes.plot(x, y, color=colour, **look)


def _caption(results: SweepResults, keys: int, *, worst_beyond: bool) -> str:
    caption = "Each line is a setting; the bluer and stronger, the better. Thick: the best setting."
    caption += " If strong lines meet at a value, this value is good for all values of the other keys."
    if len(results.compared) > keys:
        caption += f" The first {keys} of {len(results.compared)} varied keys."
    return caption + (" Values beyond the metric's axis are drawn at the axis's worst end." if worst_beyond else "")


def _axis(axes: Any, column: int, name: str, values: Sequence[Any], width: int) -> Callable[[Any], float]:
    """Draw one key's axis. Return a function from value to height (0 to 1)."""
    distinct = order(values)
    last = len(distinct) - 1
    if last >= _MOST_EVEN and all(number(one) is not None for one in distinct):
        scaled = [math.log(one) if distinct[0] > 0 else float(one) for one in distinct]
        heights = [(at - scaled[0]) / (scaled[-1] - scaled[0]) for at in scaled]
        ticks = [round(part * last / 4) for part in range(5)]
    else:
        heights = [place / last for place in range(len(distinct))] if last else [0.5]
        ticks = list(range(0, len(distinct), -(-len(distinct) // 12)))
    _draw_axis(axes, column, name, [(heights[at], clipped(short(distinct[at]), width)) for at in ticks], width)
    by_value = {identity(one): height for one, height in zip(distinct, heights, strict=True)}
    return lambda value: by_value[identity(value)]


def _metric_axis(axes: Any, column: int, results: SweepResults, low: float, high: float, width: int) -> None:
    ends = (low, high) if results.sweep.greater_is_better else (high, low)
    ticks = [(height, short(ends[0] + height * (ends[1] - ends[0]))) for height in (0, 0.25, 0.5, 0.75, 1)]
    _draw_axis(axes, column, results.sweep.metric, ticks, width)


def _draw_axis(axes: Any, column: int, name: str, ticks: Sequence[tuple[float, str]], width: int) -> None:
    axes.plot([column, column], [-0.04, 1.04], color=MUTED, linewidth=1, zorder=5)
    for height, text in ticks:
        _tick(axes, column, height, text)
    heading = folded(re.findall(r"[^_.]+[_.]*|^[_.]+", name), width)
    axes.text(column, 1.09, heading, ha="center", va="bottom", fontweight="bold")


def _tick(axes: Any, column: int, height: float, text: str) -> None:
    axes.plot([column - 0.02, column + 0.02], [height, height], color=MUTED, linewidth=1, zorder=5)
    halo = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2, "alpha": 0.82}
    axes.text(column + 0.04, height, text, ha="left", va="center", fontsize=8.5, bbox=halo, zorder=6)


def _smooth(heights: Sequence[float]) -> tuple[Any, Any]:
    """Return a curve through the heights that is horizontal at every axis."""
    x = numpy.linspace(0, len(heights) - 1, (len(heights) - 1) * _LINE_POINTS + 1)
    before = numpy.floor(x)
    share = x - before
    ease = share * share * (3 - 2 * share)  # smoothstep, because the eye can follow such a curve through a crossing
    return x, numpy.interp(before + ease, range(len(heights)), heights)


def _worst_beyond(results: SweepResults, low: float, high: float) -> bool:
    means = [one.mean for one in results.outcome.ranked if one.mean is not None]
    return any(mean < low for mean in means) if results.sweep.greater_is_better else any(mean > high for mean in means)
