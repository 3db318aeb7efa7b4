"""signals.png: norms of each group's tensors, and norms of the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loraplus_hydra.report.figures.style import NARROW, PALETTE, Picture, legend_below, new_figure, panels
from loraplus_hydra.report.formatting import short
from loraplus_hydra.report.read_job import Job, Norms
from loraplus_hydra.report.results import SweepResults


def draw(results: SweepResults, *, narrow: bool = False) -> Picture | None:
    """Draw norms and relative updates of the best job and of a baseline job."""
    best, baseline = results.outcome.best_job, results.outcome.baseline
    if best is None or not any(len(norms) > 1 for norms in best.norms.values()):
        return None
    other = baseline.done[0] if baseline and baseline is not results.outcome.best and baseline.done[0].norms else None
    groups = [group for group, norms in best.norms.items() if len(norms) > 1]
    figure = new_figure(NARROW, 6.0 + 0.17 * len(groups)) if narrow else new_figure(10.4, 4.0)
    left, right = panels(figure, 2, narrow=narrow)
    for group, colour in zip(groups, PALETTE * (len(groups) // len(PALETTE) + 1), strict=False):
        _lines(left, right, best.norms, group, {"color": colour, "label": _shown(group)})
        if other is not None:
            _lines(left, right, other.norms, group, {"color": colour, "linestyle": (0, (4, 2)), "alpha": 0.75})
    left.set_title("norm of the group's tensors")
    right.set_title("change in one step, relative to the norm")
    right.set_yscale("log")
    _plain_log_ticks(right.yaxis)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, left, narrow=narrow)
    return Picture("signals", "Do both factors learn?", _caption(best, other), figure)


def _lines(left: Any, right: Any, norms: Mapping[str, Sequence[Norms]], group: str, style: Mapping[str, Any]) -> None:
    curve = norms.get(group, ())
    left.plot([one.step for one in curve], [one.weight for one in curve], linewidth=1.8, **style)
    moved = [one for one in curve if one.weight > 0 and one.update > 0]
    right.plot([one.step for one in moved], [one.update / one.weight for one in moved], linewidth=1.8, **style)


def _plain_log_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def _caption(best: Job, other: Job | None) -> str:
    caption = f"Solid: the best job ({best.folder})."
    if other is not None:
        caption += f" Dashed: a job of the best setting at ratio 1 ({other.folder})."
    return caption + (
        " LoRA learns efficiently if both factors change (arXiv 2402.12354). In the panel of changes, a group far "
        "below the other hardly learns."
    )


def _shown(group: str) -> str:
    """Return a group's name on the page: `lora_B, no decay` for groupB_no_decay."""
    name, no_decay, _ = group.partition("_no_decay")
    factor = {"groupA": "lora_A", "groupB": "lora_B"}.get(name)
    return group if factor is None else factor + (", no decay" if no_decay else "")
