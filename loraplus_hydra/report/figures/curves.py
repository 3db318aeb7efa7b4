"""curves.png: the metric and the training loss of every job over steps, the compared settings in colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loraplus_hydra.report.compare import mean_curve
from loraplus_hydra.report.figures.style import (
    BASELINE,
    BEST,
    MUTED,
    OTHERS,
    Picture,
    new_figure,
    padded,
    robust_limits,
)
from loraplus_hydra.report.read_sweep import Job, Point
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting

_MOST_POINTS = 400  # of one line; more can't be told apart and only make the page heavy
_WIDTH = 52  # characters of a line of the legend


def draw(results: SweepResults) -> Picture | None:
    """Two panels, or one where only one kind of curve was logged."""
    jobs = results.sweep.jobs
    panels = []
    if any(len(job.evaluations) > 1 for job in jobs):
        panels.append((results.sweep.metric, [(job, job.evaluations) for job in jobs]))
    if any(len(job.losses) > 1 for job in jobs):
        panels.append(("training loss", [(job, job.losses) for job in jobs]))
    if not panels:
        return None
    compared = _compared(results)
    lines = max((label.count("\n") + 1 for _, _, label in compared), default=1)
    figure = new_figure(10.4, 4.14 + 0.16 * lines)
    beyond = 0
    for place, (name, curves) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        beyond += _panel(axes, compared, curves)
        axes.set_title(name)
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name == results.sweep.metric and results.outcome.target is not None and compared[1:]:
            axes.axhline(results.outcome.target, color=BASELINE, linestyle=":", linewidth=1.2, zorder=2)
    handles = [line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    caption = "Every job is a line; in colour the settings that are compared"
    caption += ": thick the mean over their seeds, thin each seed." if results.seeds else "."
    if results.outcome.target is not None and compared[1:]:
        caption += " Dotted: where ratio 1 ends."
    if any(not job.counts for job, _ in panels[0][1]):
        caption += " A cross ends the curve of a job that has no result."
    if beyond:
        caption += f" {beyond} points lie beyond the axis, so that the curves can be told apart."
    return Picture("curves", "Curves of every job", caption, figure)


def _panel(
    axes: Any, compared: Sequence[tuple[Setting, str, str]], curves: Sequence[tuple[Job, Sequence[Point]]]
) -> int:
    """Draw one panel; returns how many points lie beyond its axis."""
    highlighted = {job.folder: colour for setting, colour, _ in compared for job in setting.done}
    values = [point.value for _, curve in curves for point in curve]
    low, high, beyond = robust_limits(values)
    strength = 0.85 if len(curves) <= 12 else 0.5
    named = False
    for job, curve in curves:
        if not curve:
            continue
        colour = highlighted.get(job.folder)
        thin = _thinned(curve)
        label = "_" if named or colour else "other jobs"
        named = named or not colour
        axes.plot(
            [point.step for point in thin],
            [point.value for point in thin],
            color=colour or OTHERS,
            alpha=0.45 if colour else strength,
            linewidth=0.9,
            zorder=2 if colour else 1,
            label=label,
        )
        if not job.counts:
            end = min(max(curve[-1].value, low), high)
            axes.plot([curve[-1].step], [end], "x", color=MUTED, markersize=6, markeredgewidth=1.6, zorder=4)
    for setting, colour, label in compared:
        mean = _mean_of(setting, {job.folder: curve for job, curve in curves})
        marker = "o" if len(mean) <= 25 else None
        axes.plot(
            [point.step for point in mean],
            [point.value for point in mean],
            color=colour,
            linewidth=2.2,
            marker=marker,
            markersize=4,
            zorder=3,
            label=label,
        )
    axes.set_ylim(*padded(low, high))
    return beyond


def _compared(results: SweepResults) -> list[tuple[Setting, str, str]]:
    """The settings in colour: the best, and what it is compared with."""
    outcome = results.outcome
    if outcome.best is None:
        return []
    shown = [(outcome.best, BEST, "best: ")]
    if outcome.baseline is not None and outcome.baseline is not outcome.best:
        shown.append((outcome.baseline, BASELINE, "best at ratio 1: "))
    elif outcome.contender is not None and outcome.contender is not outcome.best:
        shown.append((outcome.contender, BASELINE, "best at another ratio: "))
    return [(one, colour, results.folded_label(one, _WIDTH, ahead=which)) for one, colour, which in shown]


def _mean_of(setting: Setting, curves: dict[str, Sequence[Point]]) -> Sequence[Point]:
    from dataclasses import replace

    return _thinned(mean_curve(replace(job, evaluations=tuple(curves[job.folder])) for job in setting.done))


def _thinned(curve: Sequence[Point]) -> Sequence[Point]:
    every = -(-len(curve) // _MOST_POINTS) or 1
    kept: Iterable[Point] = curve[::every]
    return [*kept, curve[-1]] if curve and (len(curve) - 1) % every else list(kept)
