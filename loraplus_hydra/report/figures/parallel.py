"""keys.png: parallel coordinates for sweeps of three keys and more, an axis for each key and one for the metric."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from loraplus_hydra.report.figures.style import BEST, MUTED, PAPER, Picture, new_figure, robust_limits
from loraplus_hydra.report.formatting import clipped, folded, short
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import order
from loraplus_hydra.report.values import number

_MOST_KEYS = 8
_CHARACTERS = 110  # beside each other in the figure
_LINE_POINTS = 24  # of the curve between two axes


def draw(results: SweepResults) -> Picture | None:
    """A line for each setting, from key to key to its metric; the darker, the better, the best one drawn over all."""
    keys = results.compared[:_MOST_KEYS]
    ranked = results.outcome.ranked
    if len(keys) < 3 or len(ranked) < 2:
        return None
    import matplotlib

    low, high, beyond = robust_limits([one.mean for one in ranked if one.mean is not None])
    high = high if high > low else low + 1e-9
    figure = new_figure(10.4, 4.4)
    axes = figure.add_subplot()
    width = _CHARACTERS // (len(keys) + 1)
    places = [
        _axis(axes, column, results.names[key], [one.values.get(key) for one in ranked], width)
        for column, key in enumerate(keys)
    ]
    _metric_axis(axes, len(keys), results, low, high, width)
    colours = matplotlib.colormaps["viridis"]
    for rank, one in reversed(list(enumerate(ranked))):
        share = min(max(((one.mean or 0.0) - low) / (high - low), 0.0), 1.0)
        good = share if results.sweep.greater_is_better else 1 - share
        heights = [place(one.values.get(key)) for place, key in zip(places, keys, strict=True)]
        # Lines that share a value are set apart a little, so that each can be followed.
        offset = 0.05 * (rank / max(len(ranked) - 1, 1) - 0.5)
        heights = [height + offset for height in heights] + [good]
        best = one is results.outcome.best
        x, y = _smooth(heights)
        if best:
            axes.plot(x, y, color=PAPER, linewidth=6, zorder=3)
            axes.plot(x, y, color=BEST, linewidth=3, zorder=4)
        else:
            strength = {"alpha": 0.3 + 0.55 * good, "linewidth": 0.9 + good}
            axes.plot(x, y, color=colours(0.78 - 0.56 * good), zorder=1 + good, **strength)
    axes.set_xlim(-0.35, len(keys) + 0.35)
    axes.set_ylim(-0.12, 1.14)
    axes.set_axis_off()
    caption = "Each line is a setting; the darker, the better. Thick and blue: the best setting."
    caption += " Where dark lines meet on an axis, that value does well whatever the others are."
    if len(results.compared) > len(keys):
        caption += f" The first {len(keys)} of {len(results.compared)} varied keys."
    if beyond:
        caption += " Far values end at the metric's worst end." if _worst_beyond(results, low, high) else ""
    return Picture("keys", "All varied keys at once", caption, figure)


def _axis(axes: Any, column: int, name: str, values: Sequence[Any], width: int) -> Callable[[Any], float]:
    """Draw one key's axis; returns where on it, from 0 to 1, a value stands."""
    distinct = order(values)
    numeric = all(number(one) is not None for one in distinct)
    heights: dict[str, float]
    if numeric and len(distinct) > 8:  # a search: at their true places
        scaled = [math.log(one) if distinct[0] > 0 else float(one) for one in distinct]
        span = scaled[-1] - scaled[0]
        heights = {repr(one): (at - scaled[0]) / span for one, at in zip(distinct, scaled, strict=True)}
        ticks = [distinct[round(part * (len(distinct) - 1) / 4)] for part in range(5)]
    else:
        heights = {
            repr(one): place / (len(distinct) - 1) if len(distinct) > 1 else 0.5 for place, one in enumerate(distinct)
        }
        ticks = distinct[:: -(-len(distinct) // 12)]
    axes.plot([column, column], [-0.04, 1.04], color=MUTED, linewidth=1, zorder=5)
    for one in ticks:
        _tick(axes, column, heights[repr(one)], clipped(short(one), width))
    _head(axes, column, name, width)
    return lambda value: heights[repr(value)]


def _metric_axis(axes: Any, column: int, results: SweepResults, low: float, high: float, width: int) -> None:
    axes.plot([column, column], [-0.04, 1.04], color=MUTED, linewidth=1, zorder=5)
    for part in (0, 0.25, 0.5, 0.75, 1):
        share = part if results.sweep.greater_is_better else 1 - part
        _tick(axes, column, part, short(low + share * (high - low)))
    _head(axes, column, results.sweep.metric, width)


def _head(axes: Any, column: int, name: str, width: int) -> None:
    text = folded(re.findall(r"[^_.]+[_.]*|^[_.]+", name), width)
    axes.text(column, 1.09, text, ha="center", va="bottom", fontweight="bold")


def _tick(axes: Any, column: int, height: float, text: str) -> None:
    axes.plot([column - 0.02, column + 0.02], [height, height], color=MUTED, linewidth=1, zorder=5)
    halo = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2, "alpha": 0.82}
    axes.text(column + 0.04, height, text, ha="left", va="center", fontsize=8.5, bbox=halo, zorder=6)


def _smooth(heights: Sequence[float]) -> tuple[list[float], list[float]]:
    """A line through the heights that crosses every axis level, so that it can be followed through a crossing."""
    x, y = [], []
    for column in range(len(heights) - 1):
        for part in range(_LINE_POINTS):
            share = part / _LINE_POINTS
            ease = share * share * (3 - 2 * share)
            x.append(column + share)
            y.append(heights[column] + ease * (heights[column + 1] - heights[column]))
    return [*x, len(heights) - 1.0], [*y, heights[-1]]


def _worst_beyond(results: SweepResults, low: float, high: float) -> bool:
    means = [one.mean for one in results.outcome.ranked if one.mean is not None]
    return any(mean < low for mean in means) if results.sweep.greater_is_better else any(mean > high for mean in means)
