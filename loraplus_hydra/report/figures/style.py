"""How every figure looks, and how it becomes a PNG and an SVG whose colours follow the page's light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loraplus_hydra.report.formatting import short

# On the page each becomes the variable of its name; no other colour may equal one of them.
INK, MUTED, GRID, PAPER, OTHERS = "#1b1f24", "#5b6470", "#dfe3e8", "#fefefe", "#b4bbc4"
# Okabe and Ito's palette: told apart by people with any colour vision.
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
# For lines that have no order.
PALETTE = (BEST, BASELINE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DOTS_PER_INCH = 140


@dataclass(frozen=True)
class Picture:
    """A figure with what a reader needs to read it."""

    name: str  # of its file, without .png
    title: str
    caption: str
    figure: Any  # a matplotlib Figure


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's settings for as long as figures are made and written; untrusted texts are never read as TeX."""
    import matplotlib

    settings = {
        "text.parse_math": False,
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
        "svg.hashsalt": "loraplus_hydra",
        "hatch.linewidth": 0.9,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches, that no window system knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as it is printed on paper."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH)
    return out.getvalue()


def svg(figure: Any, title: str) -> str:
    """The figure as an <svg> element for the page, which gives it its colours and its font."""
    from html import escape

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
    """Low and high end of a scale, and how many values lie beyond: one diverged job must not flatten all others.

    Beyond is what lies further from the middle four fifths than one and a half times their width.
    """
    import numpy

    known = numpy.asarray(list(values), dtype=float)
    if not len(known):
        return 0.0, 1.0, 0
    inner, outer = numpy.quantile(known, [0.1, 0.9])
    room = 1.5 * (outer - inner)
    if not room:  # most are equal: what isn't may still be seen
        room = 1.5 * float(numpy.ptp(known))
    inside = known[(known >= inner - room) & (known <= outer + room)]
    return float(inside.min()), float(inside.max()), len(known) - len(inside)


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Limits of an axis with some room at both ends."""
    room = (high - low) * share or abs(high) * 0.02 or 1.0
    return low - room, high + room


def log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a log axis at the values that were tried, those left out that would touch; written 1e-4."""
    import math

    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

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
    """Colours for values that have an order: viridis without the ends that vanish on a dark or on a light ground."""
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.3 if number == 1 else 0.22 + 0.56 * place / (number - 1)) for place in range(number)]
