"""ratio.png: the metric over the ratio, one line per rate of lora_A."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from loraplus_hydra.report.figures import style
from loraplus_hydra.report.figures.style import INK, MUTED
from loraplus_hydra.report.formatting import short
from loraplus_hydra.report.limits import padded, robust_limits
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting, order

# Keys that the axis and the lines show. Other varied keys get panels.
_SHOWN = ("loraplus.ratio", "loraplus.lr_A", "loraplus.lr_B", "optimizer.lr", "model.lr")
_MOST_PANELS, _MOST_LINES = 6, 12
_COLUMNS = 3  # maximum number of panels in a row
# maximum number of characters of all titles in a row
_CHARACTERS, _NARROW_CHARACTERS = 100, 40
_MARKERS = "osD^v"  # in addition to colours, for readers with any colour vision


def draw(results: SweepResults, *, narrow: bool = False) -> style.Picture | None:
    """Draw the metric over the ratio, with a panel for each value of the other keys.

    If there are too many values, a single panel shows the best over all values.
    """
    settings = [one for one in results.settings if one.ratio is not None]
    ratios = sorted({one.ratio for one in settings if one.ratio is not None})
    if len(ratios) < 2 or not any(one.mean is not None for one in settings):
        return None
    if len([one for one in settings if one.mean is not None or one.failed]) < 2:  # all others left a search
        return None
    panels = _panels(results, settings, narrow=narrow)
    looks = _looks(settings)
    limits = robust_limits([value for one in settings for value in one.measured])
    figure, grid = _figure([title for title, _ in panels], narrow=narrow)
    for axes, (title, members) in zip(grid, panels, strict=False):
        for rate, look in looks.items():
            here = [one for one in members if _rate(one) == rate]
            _line(axes, here, look, limits[:2], limits[0 if results.sweep.greater_is_better else 1])
        _mark_best(axes, results, members)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_ylim(*padded(*limits[:2], 0.09))
        if ratios[0] <= 1 <= ratios[-1]:
            axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    style.log_ticks(grid[0].xaxis, ratios)
    label = "ratio = rate of lora_B / rate of lora_A (log)"
    if narrow:
        grid[len(panels) - 1].set_xlabel(label)  # a legend below the figure would cover the figure's own label
    else:
        figure.supxlabel(label, fontsize=9.5)
    figure.supylabel(results.axis_label, fontsize=9.5)
    _legend(figure, looks, narrow=narrow)
    return style.Picture("ratio", "Which ratio?", _caption(results, settings, panels, list(looks), limits[2]), figure)


def _looks(settings: Sequence[Setting]) -> dict[float, dict[str, Any]]:
    """Return the colour and marker of each rate of lora_A, in order of the rates."""
    rates = sorted({_rate(one) for one in settings})
    return {
        rate: {"color": colour, "marker": _MARKERS[place % len(_MARKERS)]}
        for place, (rate, colour) in enumerate(zip(rates, style.ordered_colours(len(rates)), strict=True))
    }


def _figure(titles: Sequence[str], *, narrow: bool) -> tuple[Any, Any]:
    """Return a figure and its axes, one for each title."""
    columns = 1 if narrow else min(_COLUMNS, len(titles))
    rows = math.ceil(len(titles) / columns)
    further_lines = max(title.count("\n") for title in titles)
    height = 4.2 if len(titles) == 1 else (3.3 + 0.16 * further_lines) * rows + 0.4
    figure = style.new_figure(style.NARROW if narrow else 8.6 if len(titles) == 1 else 10.4, height)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(titles) :]:
        axes.set_visible(False)
    return figure, grid.flat


def _caption(
    results: SweepResults, settings: Sequence[Setting], panels: Sequence[Any], rates: Sequence[float], beyond: int
) -> str:
    caption = "Ring: the best setting."
    if results.seeds:
        caption = "Points: mean over seeds; bars: one standard deviation; small dots: single seeds; " + caption.lower()
    if any(one.ratio == 1 for one in settings):
        caption += " Dashed: ratio 1, plain LoRA."
    if len(rates) == 1:
        caption += f" The rate of lora_A is always {short(rates[0])}."
    if len(panels) == 1 and (others := [key for key in results.compared if key not in _SHOWN]):
        caption += f" Each point is the best over {', '.join(results.names[key] for key in others)}."
    if beyond or any(one.failed for one in settings):
        caption += " A cross at the edge: a job failed, or the value is beyond the axis."
    return caption


def _panels(results: SweepResults, settings: Sequence[Setting], *, narrow: bool) -> list[tuple[str, Sequence[Setting]]]:
    """Return each panel's title and settings."""
    others = [key for key in results.compared if key not in _SHOWN]
    values = order(tuple(one.values.get(key) for key in others) for one in settings)
    if not others or not 2 <= len(values) <= _MOST_PANELS:
        return [("", _best_of_each(results, settings) if others else settings)]
    if len(others) == 1:
        values = [(value,) for value in order(value[0] for value in values)]
    width = _NARROW_CHARACTERS if narrow else _CHARACTERS // min(_COLUMNS, len(values))
    return [
        (
            results.folded_label(Setting(dict(zip(others, value, strict=True)), ()), width),
            [one for one in settings if tuple(one.values.get(key) for key in others) == value],
        )
        for value in values
    ]


def _best_of_each(results: SweepResults, settings: Sequence[Setting]) -> Sequence[Setting]:
    """Return the best setting of each pair of rates."""
    best: dict[Any, Setting] = {}
    rank = {id(one): place for place, one in enumerate(results.outcome.ranked)}
    for one in sorted(settings, key=lambda one: rank.get(id(one), len(rank))):
        best.setdefault((one.ratio, _rate(one)), one)
    return list(best.values())


def _line(
    axes: Any, members: Sequence[Setting], look: Mapping[str, Any], limits: tuple[float, float], worst: float
) -> None:
    """Draw a rate's settings. A failed job is a cross at `worst`, the worse end of the axis."""
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
            edge = worst if one.mean is None or one in known else min(max(one.mean, limits[0]), limits[1])
            axes.plot([one.ratio], [edge], "x", color=look["color"], markersize=7, markeredgewidth=1.8, zorder=4)


def _mark_best(axes: Any, results: SweepResults, members: Sequence[Setting]) -> None:
    best = results.outcome.best
    if best is not None and best in members:
        axes.plot([best.ratio], [best.mean], "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=5)


def _legend(figure: Any, looks: Mapping[float, Mapping[str, Any]], *, narrow: bool) -> None:
    if len(looks) < 2:
        return
    shown = list(looks)[:: -(-len(looks) // _MOST_LINES)]
    handles = [Line2D([], [], **looks[rate], markersize=5.5, label=short(rate)) for rate in shown]
    place = {"loc": "outside lower center", "ncols": 4} if narrow else {"loc": "outside right upper"}
    figure.legend(handles=handles if narrow else handles[::-1], title="rate of lora_A", **place)


def _rate(setting: Setting) -> float:
    """Return eta_A, rounded because rates can differ by rounding errors."""
    assert setting.rates is not None
    return float(f"{setting.rates.lr_A:.6g}")
