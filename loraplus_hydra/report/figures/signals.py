"""signals.png: how large each group's tensors are and how much one step moves them: do both factors learn?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraplus_hydra.report.figures.style import PALETTE, Picture, new_figure
from loraplus_hydra.report.formatting import short
from loraplus_hydra.report.read_sweep import Job, Norms
from loraplus_hydra.report.results import SweepResults


def draw(results: SweepResults) -> Picture | None:
    """Norms on the left, relative updates on the right; the best job, and dashed the baseline's beside it."""
    best = results.outcome.best_job
    if best is None or not any(len(norms) > 1 for norms in best.norms.values()):
        return None
    baseline = results.outcome.baseline
    beside = baseline.done[0] if baseline and baseline is not results.outcome.best and baseline.done[0].norms else None
    groups = [group for group, norms in best.norms.items() if len(norms) > 1]
    figure = new_figure(10.4, 4.0)
    left, right = figure.subplots(1, 2)
    for group, colour in zip(groups, PALETTE * (len(groups) // len(PALETTE) + 1), strict=False):
        _lines(left, right, best.norms, group, {"color": colour, "label": group})
        if beside is not None:
            _lines(left, right, beside.norms, group, {"color": colour, "linestyle": (0, (4, 2)), "alpha": 0.75})
    left.set_title("norm of the group's tensors")
    right.set_title("change in one step, as a share of the norm")
    right.set_yscale("log")
    _plain_log_ticks(right.yaxis)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles = [line for line in left.get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return Picture("signals", "Do both factors learn?", _caption(best, beside), figure)


def _lines(left: Any, right: Any, norms: Mapping[str, Sequence[Norms]], group: str, style: Mapping[str, Any]) -> None:
    curve = norms.get(group, ())
    left.plot([one.step for one in curve], [one.weight for one in curve], linewidth=1.8, **style)
    moved = [one for one in curve if one.weight > 0 and one.update > 0]
    right.plot([one.step for one in moved], [one.update / one.weight for one in moved], linewidth=1.8, **style)


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def _caption(best: Job, beside: Job | None) -> str:
    caption = f"Solid: the best job ({best.folder})."
    if beside is not None:
        caption += f" Dashed: a job of the best setting at ratio 1 ({beside.folder})."
    return caption + (
        " LoRA learns efficiently when both factors move (arXiv 2402.12354): a group whose line on the right lies far "
        "below the other's hardly learns."
    )
