"""settings.png: every setting in order of its mean, with its seeds."""

from __future__ import annotations

from typing import Any

from loraplus_hydra.report.figures.style import BASELINE, BEST, MUTED, Picture, new_figure, padded, robust_limits
from loraplus_hydra.report.results import SweepResults

_MOST = 30  # settings that can be read in one figure
_WIDTH = 56  # characters of a line of a setting's label


def draw(results: SweepResults) -> Picture | None:
    """A row for each setting, the best on top."""
    ranked = results.outcome.ranked
    if len(ranked) < 2:
        return None
    shown = list(ranked[:_MOST])
    baseline = results.outcome.baseline
    if baseline is not None and baseline not in shown:
        shown[-1] = baseline
    labels = [results.folded_label(one, _WIDTH) for one in shown]
    lines = max(label.count("\n") for label in labels) + 1
    figure = new_figure(9.4, 1.1 + (0.11 + 0.16 * lines) * len(shown))
    axes = figure.add_subplot()
    low, high, beyond = robust_limits([value for one in shown for value in one.measured])
    for place, one in enumerate(shown):
        colour = BEST if one is results.outcome.best else BASELINE if one is baseline else MUTED
        axes.plot(one.measured, [place] * len(one.measured), "o", color=colour, alpha=0.4, markersize=4, zorder=2)
        spread = one.spread or 0
        axes.errorbar([one.mean], [place], xerr=[[spread], [spread]], fmt="o", **_bar(colour))
    axes.set_yticks(range(len(shown)), labels)
    for label, one in zip(axes.get_yticklabels(), shown, strict=True):
        if one in (results.outcome.best, baseline):
            label.set_fontweight("bold")
            label.set_color(BEST if one is results.outcome.best else BASELINE)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(*padded(low, high))
    axes.set_xlabel(f"{results.sweep.metric}, {results.better} is better")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    caption = "Mean over seeds with one standard deviation; small dots are single seeds. " if results.seeds else ""
    caption += "Blue: the best setting."
    if baseline is not None:
        caption += " Orange: the best at ratio 1."
    if len(ranked) > len(shown):
        caption += f" The best {len(shown)} of {len(ranked)} settings."
    if beyond:
        caption += " Far values lie beyond the axis."
    return Picture("settings", "Every setting, the best on top", caption, figure)


def _bar(colour: str) -> dict[str, Any]:
    return {"color": colour, "markersize": 6.5, "elinewidth": 1.8, "capsize": 3, "zorder": 3}
