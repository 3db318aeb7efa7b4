"""settings.png: all settings, ranked by their mean, with their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraplus_hydra.report.figures.style import BASELINE, BASELINE_TEXT, BEST, INK, MUTED, NARROW, Picture, new_figure
from loraplus_hydra.report.limits import padded, robust_limits
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting

_MOST = 30  # maximum number of settings that are legible in one figure
_WIDTH, _NARROW_WIDTH = 56, 46  # characters per line of a setting's label


def draw(results: SweepResults, *, narrow: bool = False) -> Picture | None:
    """Draw one row per setting, with the best at the top."""
    ranked, baseline = results.outcome.ranked, results.outcome.baseline
    if len(ranked) < 2:
        return None
    shown = list(ranked[:_MOST])
    if baseline is not None and baseline not in shown:
        shown[-1] = baseline
    labels = [results.folded_label(one, _NARROW_WIDTH if narrow else _WIDTH) for one in shown]
    lines = max(label.count("\n") for label in labels) + 1
    text = 0.16 * lines  # inches
    row = 0.26 + text if narrow else 0.11 + text
    figure = new_figure(NARROW if narrow else 9.4, 1.1 + row * len(shown))
    axes = figure.add_subplot()
    low, high, beyond = robust_limits([value for one in shown for value in one.measured])
    colours = [BEST if one is results.outcome.best else BASELINE if one is baseline else MUTED for one in shown]
    _rows(axes, shown, colours)
    if narrow:
        _labels_above(axes, labels, colours)
        axes.set_ylim(len(shown) - 0.6, -0.1 - (text + 0.1) / row)
    else:
        _labels_beside(axes, labels, colours)
        axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(*padded(low, high))
    axes.set_xlabel(results.axis_label)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return Picture("settings", "All settings, with the best at the top", _caption(results, len(shown), beyond), figure)


def _rows(axes: Any, shown: Sequence[Setting], colours: Sequence[str]) -> None:
    for place, (one, colour) in enumerate(zip(shown, colours, strict=True)):
        axes.plot(one.measured, [place] * len(one.measured), "o", color=colour, alpha=0.4, markersize=4, zorder=2)
        bar = {"color": colour, "markersize": 6.5, "elinewidth": 1.8, "capsize": 3, "zorder": 3}
        axes.errorbar([one.mean], [place], xerr=[[one.spread or 0], [one.spread or 0]], fmt="o", **bar)


def _labels_beside(axes: Any, labels: Sequence[str], colours: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set(**_look(colour))


def _labels_above(axes: Any, labels: Sequence[str], colours: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [""] * len(labels))
    for place, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        above = {"xytext": (0, 5), "textcoords": "offset points", "va": "bottom", "fontsize": 8.5}
        axes.annotate(label, (0, place), xycoords=axes.get_yaxis_transform(), **above, **_look(colour))


def _look(colour: str) -> dict[str, str]:
    """Return the look of a label; those of the two compared settings stand out."""
    if colour == MUTED:
        return {"color": INK}
    return {"fontweight": "bold", "color": BASELINE_TEXT if colour == BASELINE else colour}


def _caption(results: SweepResults, shown: int, beyond: int) -> str:
    caption = "Mean over seeds with one standard deviation; small dots are single seeds. " if results.seeds else ""
    caption += "Blue: the best setting."
    if results.outcome.baseline is not None:
        caption += " Orange: the best at ratio 1."
    if len(results.outcome.ranked) > shown:
        caption += f" The best {shown} of {len(results.outcome.ranked)} settings."
    return caption + (" Some values lie beyond the axis." if beyond else "")
