"""train.png: loss and rates over the steps of one run."""

from __future__ import annotations

from pathlib import Path

from loraplus_hydra.io.files import unfinished
from loraplus_hydra.io.read import read_lines

# Okabe and Ito's palette: told apart by people with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_training(metrics: Path, out: Path) -> None:
    """Loss (training and evaluation) above, each group's rate below on a log axis, as a PNG at `out`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_lines(metrics)
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    loss.plot([x["step"] for x in trained], [x["loss"] for x in trained], color=COLOURS[0], label="training")
    loss.plot(
        [x["step"] for x in evaluated], [x["eval_loss"] for x in evaluated], "o-", color=COLOURS[1], label="evaluation"
    )
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    for index, group in enumerate(trained[-1]["lr"] if trained else ()):
        steps = [line["step"] for line in trained if line["lr"].get(group)]  # a rate of 0 has no place on a log axis
        values = [line["lr"][group] for line in trained if line["lr"].get(group)]
        rates.plot(steps, values, color=COLOURS[index % len(COLOURS)], label=group)
    rates.set_yscale("log")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("optimizer step")
    if rates.lines:
        rates.legend(frameon=False)
    for axes in (loss, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(unfinished(out), format="png")
    unfinished(out).replace(out)
