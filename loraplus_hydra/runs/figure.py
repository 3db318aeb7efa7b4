"""train.png: loss and rates over the steps of one run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from loraplus_hydra.io.files import write_bytes
from loraplus_hydra.io.read import read_lines

# Okabe and Ito's palette, whose colours people with any colour vision can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


# Fixed margins, as fractions of the figure. A layout engine would draw every text several times to find margins.
MARGINS = {"left": 0.11, "right": 0.98, "bottom": 0.09, "top": 0.97, "hspace": 0.08}


def draw_training(metrics: Path, out: Path) -> None:
    """Draw losses and, on a log axis, each group's rate. Write the figure as a PNG to `out`."""
    lines = read_lines(metrics)
    figure = Figure(figsize=(8, 6), dpi=120)
    FigureCanvasAgg(figure)
    loss, rates = figure.subplots(2, 1, sharex=True, gridspec_kw={**MARGINS, "height_ratios": (3, 2)})
    trained = [line for line in lines if "loss" in line]
    _draw_loss(loss, trained, [line for line in lines if "eval_loss" in line])
    _draw_rates(rates, trained)
    for axes in (loss, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_bytes(out, drawn.getvalue())


def _draw_loss(axes: Axes, trained: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> None:
    axes.plot([x["step"] for x in trained], [x["loss"] for x in trained], color=COLOURS[0], label="training")
    axes.plot(
        [x["step"] for x in evaluated], [x["eval_loss"] for x in evaluated], "o-", color=COLOURS[1], label="evaluation"
    )
    axes.set_ylabel("loss")
    axes.legend(frameon=False)


def _draw_rates(axes: Axes, trained: list[dict[str, Any]]) -> None:
    for index, group in enumerate(trained[-1]["lr"] if trained else ()):
        steps = [line["step"] for line in trained if line["lr"].get(group)]  # a log axis can't show a rate of 0
        values = [line["lr"][group] for line in trained if line["lr"].get(group)]
        axes.plot(steps, values, color=COLOURS[index % len(COLOURS)], label=group)
    axes.set_yscale("log")
    # Plain text, because it is drawn faster than 10^-4. If the rates span less than a decade, minor ticks have labels,
    # too.
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_ylabel("learning rate")
    axes.set_xlabel("optimizer step")
    if axes.lines:
        axes.legend(frameon=False)
