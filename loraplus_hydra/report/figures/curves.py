"""curves.png: metric and training loss of every job over the steps."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from loraplus_hydra.report.compare import mean_curve
from loraplus_hydra.report.figures import style
from loraplus_hydra.report.figures.style import BASELINE, BEST, MUTED, OTHERS
from loraplus_hydra.report.limits import beyond_axis, padded, robust_limits
from loraplus_hydra.report.read_job import Job, Point
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting

_MOST_POINTS = 400  # maximum number of points of a line; more are not visible and make the page larger
_WIDTH, _NARROW_WIDTH = 52, 36  # characters per line of the legend

Curves = Sequence[tuple[Job, Sequence[Point]]]
Compared = Sequence[tuple[Setting, str, str]]  # setting, colour, label


def draw(results: SweepResults, *, narrow: bool = False) -> style.Picture | None:
    """Draw a panel for the metric and one for the training loss, if logged."""
    jobs = results.sweep.jobs
    kinds: tuple[tuple[str, Curves], ...] = (
        (results.sweep.metric, [(job, job.evaluations) for job in jobs]),
        ("training loss", [(job, job.losses) for job in jobs]),
    )
    panels = [(name, curves) for name, curves in kinds if any(len(curve) > 1 for _, curve in curves)]
    if not panels:
        return None
    compared = _compared(results, _NARROW_WIDTH if narrow else _WIDTH)
    lines = [label.count("\n") + 1 for _, _, label in compared] or [1]
    if narrow:
        figure = style.new_figure(style.NARROW, 2.8 * len(panels) + 0.4 + 0.17 * sum(lines))
    else:
        figure = style.new_figure(10.4, 4.14 + 0.16 * max(lines))
    target = results.outcome.target if compared[1:] else None
    ended = {job.folder for job in (*results.sweep.pruned, *results.sweep.unsuccessful)}
    beyond = 0
    for axes, (name, curves) in zip(style.panels(figure, len(panels), narrow=narrow), panels, strict=True):
        beyond += _panel(axes, name, compared, curves, ended)
        if name == results.sweep.metric and target is not None:
            axes.axhline(target, color=BASELINE, linestyle=":", linewidth=1.2, zorder=2)
    style.legend_below(figure, figure.axes[0], narrow=narrow)
    return style.Picture("curves", "Curves of every job", _caption(results, target, beyond), figure)


def _caption(results: SweepResults, target: float | None, beyond: int) -> str:
    caption = "Each line is a job. The two compared settings have colours"
    caption += ": thick lines are means over seeds, thin lines are single seeds." if results.seeds else "."
    if target is not None:
        caption += " Dotted: the final value of ratio 1."
    if results.sweep.pruned or results.sweep.unsuccessful:
        caption += " A cross is at the end of a job that failed, was stopped, or left the search."
    return caption + beyond_axis(beyond)


def _panel(axes: Any, name: str, compared: Compared, curves: Curves, ended: Container[str]) -> int:
    """Draw one panel; return the number of points beyond its axis."""
    by_folder = {job.folder: curve for job, curve in curves}
    means = [mean_curve(by_folder[job.folder] for job in setting.done) for setting, _, _ in compared]
    best = [point.value for point in means[0]] if means else []  # else a search's other jobs could hide its end
    low, high, beyond = robust_limits([point.value for _, curve in curves for point in curve], always=best)
    _job_lines(axes, compared, [(job, curve) for job, curve in curves if curve], 0.85 if len(curves) <= 12 else 0.5)
    for job, curve in curves:
        if curve and job.folder in ended:
            end = min(max(curve[-1].value, low), high)
            axes.plot([curve[-1].step], [end], "x", color=MUTED, markersize=6, markeredgewidth=1.6, zorder=4)
    for (_, colour, label), curve in zip(compared, means, strict=True):
        mean = _thinned(curve)
        marker = "o" if len(mean) <= 25 else None
        _line(axes, mean, color=colour, linewidth=2.2, marker=marker, markersize=4, zorder=3, label=label)
    axes.set_ylim(*padded(low, high))
    axes.set_title(name)
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return beyond


def _job_lines(axes: Any, compared: Compared, curves: Curves, strength: float) -> None:
    highlighted: Mapping[str, str] = {job.folder: colour for setting, colour, _ in compared for job in setting.done}
    label = "other jobs"  # only the first has this label; labels that begin with _ are not in the legend
    for job, curve in curves:
        thin = _thinned(curve)
        if colour := highlighted.get(job.folder):
            _line(axes, thin, color=colour, alpha=0.45, linewidth=0.9, zorder=2, label="_")
        else:
            _line(axes, thin, color=OTHERS, alpha=strength, linewidth=0.9, zorder=1, label=label)
            label = "_"


def _line(axes: Any, curve: Sequence[Point], **look: Any) -> None:
    axes.plot([point.step for point in curve], [point.value for point in curve], **look)


def _compared(results: SweepResults, width: int) -> Compared:
    """Return the settings that are drawn in colour: the best one, and the one compared with it."""
    outcome = results.outcome
    if outcome.best is None:
        return []
    shown = [(outcome.best, BEST, "best: ")]
    if outcome.baseline is not None and outcome.baseline is not outcome.best:
        shown.append((outcome.baseline, BASELINE, "best at ratio 1: "))
    elif outcome.contender is not None and outcome.contender is not outcome.best:
        shown.append((outcome.contender, BASELINE, "best at another ratio: "))
    return [(one, colour, results.folded_label(one, width, prefix=prefix)) for one, colour, prefix in shown]


def _thinned(curve: Sequence[Point]) -> Sequence[Point]:
    every = -(-len(curve) // _MOST_POINTS) or 1
    kept: Iterable[Point] = curve[::every]
    return [*kept, curve[-1]] if curve and (len(curve) - 1) % every else list(kept)
