"""The figures' style, and their export as PNG and SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from loraplus_hydra.report.formatting import short

# On the page each colour becomes the CSS variable with its name, so all other colours must be different.
INK, MUTED, GRID, PAPER, OTHERS = "#1b1f24", "#5b6470", "#dfe3e8", "#fefefe", "#a3abb6"
# Okabe and Ito's palette, which suits every kind of colour vision.
BEST, BASELINE = "#0072b2", "#d55e00"
BASELINE_TEXT = "#b34e00"  # texts need more contrast than lines
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    OTHERS: "others",
    BEST: "best",
    BASELINE: "baseline",
    BASELINE_TEXT: "warm",
}
# Colours for lines without an order.
PALETTE = (BEST, BASELINE, "#009e73", "#cc79a7", "#b07700", "#8069c9")
# Colours of ordered lines. None is like the baseline's, and all are visible on light and on dark pages.
_ORDERED = LinearSegmentedColormap.from_list("ordered", ("#0b8567", "#0d78c9", "#9c5bc0", "#c94080"))
DOTS_PER_INCH = 140
NARROW = 4.0  # inches; the width of a figure for phones
_PIXELS = 104, 80  # on the page for an inch: at most, and at least for a figure that is wider than a phone
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
    "axes.formatter.useoffset": False,  # else an axis of nearly equal values says `1e-5+3.617`
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
    narrow_svg: str = ""  # the same for phones
    png: bytes = b""


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, because pyplot would search for a display
    return figure


def panels(figure: Any, number: int, *, narrow: bool) -> list[Any]:
    """Return the axes of `number` panels: side by side, or one below the other."""
    rows, columns = (number, 1) if narrow else (1, number)
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def legend_below(figure: Any, axes: Any, *, narrow: bool) -> None:
    """Add a legend of the labelled lines in `axes` below the figure, in one row or in one column."""
    handles = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else len(handles))


def png(figure: Any) -> bytes:
    """Return the figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    return out.getvalue()


def svg(figure: Any, title: str, kind: str) -> str:
    """Return the figure as an <svg> element in the page's colours and font.

    `kind` becomes the element's class: `wide` or `narrow`.
    """
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Each element's ids must differ from those of all others, because a hidden element's clip paths hide what uses them
    with matplotlib.rc_context({"svg.hashsalt": f"loraplus_hydra {kind} {title}"}):
        figure.savefig(out, format="svg", metadata=metadata, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", text)
    width = figure.get_figwidth()
    most, least = _PIXELS[0] * width, _PIXELS[1] * width if kind == "narrow" and width > NARROW else 0
    size = f"max-width:{most:.0f}px;min-width:{least:.0f}px"
    opening = f'<svg class="{kind}" role="img" aria-label="{escape(title)}" style="{size}"'
    return re.sub(
        r"<svg((?: [\w:]+=\"[^\"]*\")*)>", lambda found: opening + _without_size(found[1]) + ">", text, count=1
    )


def _without_size(attributes: str) -> str:
    return re.sub(r" (?:width|height|version)=\"[^\"]*\"", "", attributes)


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
    """Return colours for ordered values."""
    return [ordered_colour(place / max(number - 1, 1)) for place in range(number)]


def ordered_colour(share: float) -> Any:
    """Return the colour of a place between the first (0) and the last one (1)."""
    return _ORDERED(share)


def ink_on(colour: Any) -> str:
    """Return black or white: the one with more contrast on `colour`. It is at least 4.5 (WCAG)."""
    parts = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"
