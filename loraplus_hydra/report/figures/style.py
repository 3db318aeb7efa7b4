"""The figures' style, and their export as PNG and SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from loraplus_hydra.report.formatting import short

# On the page each colour becomes the CSS variable with its name, so all other colours must be different.
INK, MUTED, GRID, PAPER, OTHERS = "#1b1f24", "#5b6470", "#dfe3e8", "#fefefe", "#b4bbc4"
# Okabe and Ito's palette, which suits every kind of colour vision.
BEST, BASELINE = "#0072b2", "#d55e00"
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    OTHERS: "others",
    BEST: "best",
    BASELINE: "baseline",
}
# Colours for lines without an order.
PALETTE = (BEST, BASELINE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DOTS_PER_INCH = 140
# matplotlib's settings while the figures are drawn and written.
SETTINGS = {
    "text.parse_math": False,  # texts are untrusted
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": PAPER,
    "savefig.facecolor": "auto",
    "svg.fonttype": "none",
    "svg.hashsalt": "loraplus_hydra",  # fixed, so that the same sweep gives the same file
    "hatch.linewidth": 0.9,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Picture:
    """A figure with its title and caption."""

    name: str  # name of the file, without .png
    title: str
    caption: str
    figure: Any  # a matplotlib Figure
    svg: str = ""  # the figure as an <svg> element; empty before it is written


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, because pyplot would search for a display
    return figure


def legend_below(figure: Any, axes: Any) -> None:
    """Add a legend of the labelled lines in `axes` below the figure, in one row."""
    handles = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def png(figure: Any) -> bytes:
    """Return the figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    return out.getvalue()


def svg(figure: Any, title: str) -> str:
    """Return the figure as an <svg> element in the page's colours and font."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=metadata, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", text)
    width = figure.get_figwidth()
    opening = f'<svg role="img" aria-label="{escape(title)}" style="max-width:{width * 104:.0f}px"'
    return re.sub(
        r"<svg((?: [\w:]+=\"[^\"]*\")*)>", lambda found: opening + _without_size(found[1]) + ">", text, count=1
    )


def _without_size(attributes: str) -> str:
    return re.sub(r" (?:width|height|version)=\"[^\"]*\"", "", attributes)


def robust_limits(values: Iterable[float]) -> tuple[float, float, int]:
    """Return the ends of a scale, and the number of values beyond it.

    A value is beyond the scale if its distance from the middle 80% of the values is more than 1.5 times the width of
    that range. So a diverged job does not flatten the other jobs' curves.
    """
    known = numpy.asarray(list(values), dtype=float)
    if not len(known):
        return 0.0, 1.0, 0
    inner, outer = numpy.quantile(known, [0.1, 0.9])
    room = 1.5 * (outer - inner)
    if not room:  # if most values are equal, all values stay on the scale
        room = 1.5 * float(numpy.ptp(known))
    inside = known[(known >= inner - room) & (known <= outer + room)]
    return float(inside.min()), float(inside.max()), len(known) - len(inside)


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Return limits of an axis with some room at both ends."""
    room = (high - low) * share or abs(high) * 0.02 or 1.0
    return low - room, high + room


def log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Set a log axis's ticks to `values`, except values whose labels would overlap."""
    ordered = sorted(set(values))
    span = math.log(ordered[-1] / ordered[0]) or 1.0
    kept: list[float] = []
    for value in ordered:
        if not kept or math.log(value / kept[-1]) > span / 14:
            kept.append(value)
    axis.set_major_locator(FixedLocator(kept))
    axis.set_major_formatter(FixedFormatter([short(value) for value in kept]))
    axis.set_minor_locator(NullLocator())


def ordered_colours(number: int) -> list[Any]:
    """Return viridis colours for ordered values."""
    scale = matplotlib.colormaps["viridis"]  # without both ends, which are hard to see on light or dark pages
    return [scale(0.3 if number == 1 else 0.22 + 0.56 * place / (number - 1)) for place in range(number)]
