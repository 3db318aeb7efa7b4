"""ratio.png: the metric against the ratio on a log axis, a line for each rate of lora_A."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loraplus_hydra.report.figures.style import (
    INK,
    MUTED,
    Picture,
    log_ticks,
    new_figure,
    ordered_colours,
    padded,
    robust_limits,
)
from loraplus_hydra.report.formatting import short
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting, order

# Keys that the axis and the lines show already; what else varies gives panels.
_SHOWN = ("loraplus.ratio", "loraplus.lr_A", "loraplus.lr_B", "optimizer.lr", "model.lr")
_MOST_PANELS, _MOST_LINES = 6, 12
_COLUMNS = 3  # of panels
_CHARACTERS = 100  # beside each other in their titles
_MARKERS = "osD^v"  # beside the colours, for those who can't tell these apart


def draw(results: SweepResults) -> Picture | None:
    """Panels for the values of other varied keys where they are few; the best over those keys where they are many."""
    settings = [one for one in results.settings if one.ratio is not None]
    ratios = sorted({one.ratio for one in settings if one.ratio is not None})
    if len(ratios) < 2 or not any(one.mean is not None for one in settings):
        return None
    panels = _panels(results, settings)
    rates = sorted({_rate(one) for one in settings})
    looks: dict[float, dict[str, Any]] = {
        rate: {"color": colour, "marker": _MARKERS[place % len(_MARKERS)]}
        for place, (rate, colour) in enumerate(zip(rates, ordered_colours(len(rates)), strict=True))
    }
    columns = min(_COLUMNS, len(panels))
    lines = max(title.count("\n") for title, _ in panels)  # beyond the first
    height = 4.2 if len(panels) == 1 else (3.3 + 0.16 * lines) * math.ceil(len(panels) / columns) + 0.4
    figure = new_figure(8.6 if len(panels) == 1 else 10.4, height)
    low, high, beyond = robust_limits([value for one in settings for value in one.measured])
    grid = figure.subplots(math.ceil(len(panels) / columns), columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, members) in zip(grid.flat, panels, strict=False):
        for rate in rates:
            _line(axes, [one for one in members if _rate(one) == rate], looks[rate], (low, high))
        _mark_best(axes, results, members)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_ylim(*padded(low, high, 0.09))
        if ratios[0] <= 1 <= ratios[-1]:
            axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    log_ticks(grid.flat[0].xaxis, ratios)
    figure.supxlabel("ratio = rate of lora_B / rate of lora_A (log)", fontsize=9.5)
    figure.supylabel(f"{results.sweep.metric}, {results.better} is better", fontsize=9.5)
    _legend(figure, rates, looks)
    return Picture("ratio", "Which ratio?", _caption(results, settings, panels, rates, beyond), figure)


def _caption(
    results: SweepResults, settings: Sequence[Setting], panels: Sequence[Any], rates: Sequence[float], beyond: int
) -> str:
    caption = "Ring: the best setting."
    if results.seeds:
        caption = "Points: mean over seeds; bars: one standard deviation; small dots: single seeds; " + caption.lower()
    if any(one.ratio == 1 for one in settings):
        caption += " Dashed: ratio 1, plain LoRA."
    if len(rates) == 1:
        caption += f" The rate of lora_A is {short(rates[0])} everywhere."
    if len(panels) == 1 and (others := [key for key in results.compared if key not in _SHOWN]):
        caption += f" Each point is the best over {', '.join(results.names[key] for key in others)}."
    if beyond or any(one.failed for one in settings):
        caption += " A cross at the edge: a job failed, or its value lies far beyond the axis."
    return caption


def _panels(results: SweepResults, settings: Sequence[Setting]) -> list[tuple[str, Sequence[Setting]]]:
    """Titles, with the settings of each."""
    others = [key for key in results.compared if key not in _SHOWN]
    values = order(tuple(one.values.get(key) for key in others) for one in settings)
    if not others or not 2 <= len(values) <= _MOST_PANELS:
        return [("", _best_of_each(results, settings) if others else settings)]
    if len(others) == 1:
        values = [(value,) for value in order(value[0] for value in values)]
    width = _CHARACTERS // min(_COLUMNS, len(values))
    return [
        (
            results.folded_label(Setting(dict(zip(others, value, strict=True)), ()), width),
            [one for one in settings if tuple(one.values.get(key) for key in others) == value],
        )
        for value in values
    ]


def _best_of_each(results: SweepResults, settings: Sequence[Setting]) -> Sequence[Setting]:
    """The best setting of each pair of rates."""
    best: dict[Any, Setting] = {}
    rank = {id(one): place for place, one in enumerate(results.outcome.ranked)}
    for one in sorted(settings, key=lambda one: rank.get(id(one), len(rank))):
        best.setdefault((one.ratio, _rate(one)), one)
    return list(best.values())


def _line(axes: Any, members: Sequence[Setting], look: Mapping[str, Any], limits: tuple[float, float]) -> None:
    members = sorted(members, key=lambda one: one.ratio or 0)
    known = [one for one in members if one.mean is not None and limits[0] <= one.mean <= limits[1]]
    axes.errorbar(
        [one.ratio for one in known],
        [one.mean for one in known],
        yerr=[one.spread or 0 for one in known],
        **look,
        markersize=5.5,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=3,
        zorder=3,
    )
    small = {"linestyle": "", "marker": ".", "color": look["color"], "alpha": 0.5, "markersize": 4}
    for one in known:
        if len(one.measured) > 1:
            axes.plot([one.ratio] * len(one.measured), one.measured, **small, zorder=2)
    for one in members:
        if one.failed or (one.mean is not None and one not in known):
            edge = limits[0] if one.mean is not None and one.mean < limits[0] else limits[1]
            axes.plot([one.ratio], [edge], "x", color=look["color"], markersize=7, markeredgewidth=1.8, zorder=4)


def _mark_best(axes: Any, results: SweepResults, members: Sequence[Setting]) -> None:
    best = results.outcome.best
    if best is not None and best in members:
        axes.plot([best.ratio], [best.mean], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=5)


def _legend(figure: Any, rates: Sequence[float], looks: Mapping[float, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    if len(rates) < 2:
        return
    shown = rates if len(rates) <= _MOST_LINES else rates[:: -(-len(rates) // _MOST_LINES)]
    handles = [Line2D([], [], **looks[rate], markersize=5.5, label=short(rate)) for rate in shown]
    figure.legend(handles=handles[::-1], title="rate of lora_A", loc="outside right upper")


def _rate(setting: Setting) -> float:
    """eta_A, rounded so that equal rates are equal."""
    assert setting.rates is not None
    return float(f"{setting.rates.lr_A:.6g}")
