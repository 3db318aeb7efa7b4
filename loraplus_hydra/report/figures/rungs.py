"""rungs.png: the candidates of a halved search at each rung, and who left when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraplus_hydra.report.figures.style import BEST, INK, MUTED, NARROW, OTHERS, Picture, new_figure
from loraplus_hydra.report.formatting import clipped
from loraplus_hydra.report.limits import padded, robust_limits
from loraplus_hydra.report.read_sweep import RungLosses
from loraplus_hydra.report.results import SweepResults

_MOST = 200  # candidates
_MOST_NAMED = 4  # candidates with their names beside their last points
_LONGEST, _NARROW_LONGEST = 48, 22  # characters of a name


def draw(results: SweepResults, *, narrow: bool = False) -> Picture | None:
    """Draw a line for each candidate, from rung to rung."""
    rungs = sorted(results.sweep.rungs, key=lambda one: one.step)
    if not rungs or len(rungs[0].values) < 2:
        return None
    figure = new_figure(NARROW, 4.0) if narrow else new_figure(9.4, 4.4)
    axes = figure.add_subplot()
    low, high, beyond = robust_limits([value for rung in rungs for value, _ in rung.values.values()])
    named = _best(rungs[-1], results)
    names = list(dict.fromkeys([*named, *(name for rung in reversed(rungs) for name in rung.values)]))
    for name in names[:_MOST]:
        label = clipped(_shown(name, results), _NARROW_LONGEST if narrow else _LONGEST)
        _draw_candidate(axes, rungs, name, named, label)
    axes.set_ylim(*padded(low, high))
    axes.set_xscale("log")
    axes.set_xticks([rung.step for rung in rungs], [f"{rung.step:,}" for rung in rungs])
    axes.minorticks_off()
    axes.set_xlim(rungs[0].step * 0.9, rungs[-1].step * (2.2 if len(rungs) > 1 else 1.5))
    axes.set_xlabel("optimizer step of the rung")
    label = "loss, lower is better" if results.sweep.rungs_by_loss else results.axis_label
    axes.set_ylabel(f"{label}, on the rung's rows")
    return Picture("rungs", "The search, rung by rung", _caption(beyond, len(names) - _MOST), figure)


def _draw_candidate(axes: Any, rungs: Sequence[RungLosses], name: str, named: Mapping[str, str], label: str) -> None:
    points = [(rung.step, *rung.values[name]) for rung in rungs if name in rung.values]
    colour = named.get(name, OTHERS)
    steps, values = [step for step, _, _ in points], [value for _, value, _ in points]
    axes.plot(steps, values, "o-", color=colour, linewidth=1.4, markersize=4, zorder=3 if name in named else 1)
    if not points[-1][2]:
        axes.plot(steps[-1:], values[-1:], "x", color=MUTED, markersize=7, markeredgewidth=1.6, zorder=4)
    if name in named:
        at = (steps[-1], values[-1])
        axes.annotate(label, at, xytext=(8, 0), textcoords="offset points", va="center", color=INK, fontsize=8.5)


def _shown(name: str, results: SweepResults) -> str:
    """Return a candidate's name with short keys: `lr=1e-3 ratio=4`."""
    for key, short in results.names.items():
        name = name.replace(f"{key}=", f"{short}=")
    return name


def _best(rung: RungLosses, results: SweepResults) -> dict[str, str]:
    """Return the colour of each candidate with a name: of the last rung, the best first."""
    sign = -1 if results.sweep.greater_is_better and not results.sweep.rungs_by_loss else 1
    stays = sorted(rung.values, key=lambda name: (not rung.values[name][1], sign * rung.values[name][0]))
    return {name: BEST if place == 0 else MUTED for place, name in enumerate(stays[:_MOST_NAMED])}


def _caption(beyond: int, left_out: int) -> str:
    caption = "Each line is a candidate. A cross: it left there. Rungs have different rows, so compare within a rung."
    if left_out > 0:
        caption += f" {left_out} candidates that left early are not drawn."
    return caption + (f" {beyond} points lie beyond the axis." if beyond else "")
