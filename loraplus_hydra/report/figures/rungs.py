"""rungs.png: the candidates of a halved search at each rung, and who left when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D

from loraplus_hydra.io.text import presentable
from loraplus_hydra.report.figures.style import INK, MUTED, NARROW, PALETTE, Picture, new_figure, panels
from loraplus_hydra.report.formatting import clipped
from loraplus_hydra.report.limits import beyond_axis, padded, robust_limits
from loraplus_hydra.report.read_sweep import RungLosses
from loraplus_hydra.report.results import SweepResults

_MOST = 200  # candidates
_MOST_NAMED = 4  # candidates with names in the legend
_MARKERS = "osD^"  # in addition to colours, for readers with any colour vision
_LONGEST, _NARROW_LONGEST = 60, 44  # characters of a name


def draw(results: SweepResults, *, narrow: bool = False) -> Picture | None:
    """Draw a panel for each rung, with the candidates in their order."""
    rungs = sorted(results.sweep.rungs, key=lambda one: one.step)
    if not rungs or len(rungs[0].values) < 2:
        return None
    figure = new_figure(NARROW, 0.6 + 2.2 * len(rungs)) if narrow else new_figure(9.4, 4.4)
    sign = -1 if results.sweep.greater_is_better and not results.sweep.rungs_by_loss else 1
    ordered = [sorted(rung.values, key=lambda name: sign * rung.values[name][0]) for rung in rungs]
    stayed = sorted(ordered[-1], key=lambda name: not rungs[-1].values[name][1])
    looks = dict(zip(stayed[:_MOST_NAMED], zip(PALETTE, _MARKERS, strict=False), strict=False))
    beyond = 0
    for axes, rung, names in zip(panels(figure, len(rungs), narrow=narrow), rungs, ordered, strict=True):
        beyond += _draw_rung(axes, rung, names[:_MOST], looks)
    label = "loss, lower is better" if results.sweep.rungs_by_loss else results.axis_label
    figure.supylabel(f"{label}, on the rung's rows", fontsize=9.5)
    longest = _NARROW_LONGEST if narrow else _LONGEST
    handles = [
        Line2D([], [], linestyle="", color=colour, marker=marker, label=clipped(_shown(name, results), longest))
        for name, (colour, marker) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else 2)
    left_out = max(len(rungs[0].values) - _MOST, 0)
    return Picture("rungs", "The search, rung by rung", _caption(beyond, left_out), figure)


def _draw_rung(axes: Any, rung: RungLosses, names: Sequence[str], looks: Mapping[str, tuple[str, str]]) -> int:
    """Draw a rung's candidates. Return the number of values beyond the axis."""
    low, high, beyond = robust_limits([rung.values[name][0] for name in names])
    for place, name in enumerate(names, start=1):
        value, stays = rung.values[name]
        colour, marker = looks.get(name, (MUTED, "o"))
        axes.plot([place], [value], marker, color=colour, markersize=6 if name in looks else 4, zorder=3)
        if not stays:
            axes.plot([place], [value], "x", color=INK, markersize=8, markeredgewidth=1.3, zorder=4)
    axes.set_ylim(*padded(low, high, 0.08))
    axes.set_xlim(0.4, len(names) + 0.6)
    axes.set_xticks([])
    stay = sum(stays for _, stays in rung.values.values())
    axes.set_title(f"step {rung.step:,}: {stay} of {len(rung.values)} stay")
    return beyond


def _shown(name: str, results: SweepResults) -> str:
    """Return a candidate's name with short keys: `lr=1e-3 ratio=4`."""
    for key, short in results.names.items():
        name = name.replace(f"{key}=", f"{short}=")
    return presentable(name)


def _caption(beyond: int, left_out: int) -> str:
    caption = (
        "Each point is a candidate, the best of the rung first. A cross: it left there. Rungs have different rows, so "
        "compare within a rung."
    )
    if left_out > 0:
        caption += f" {left_out} candidates that left early are not drawn."
    return caption + beyond_axis(beyond)
