"""heatmap.png: the metric for each pair of rates, eta_A and eta_B."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from loraplus_hydra.report.compare import is_near
from loraplus_hydra.report.figures import style
from loraplus_hydra.report.figures.style import BASELINE, INK, MUTED, OTHERS, PAPER
from loraplus_hydra.report.formatting import measured, short
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting

_FULL = 0.6  # minimum share of existing cells for a grid; with fewer, points on log axes are drawn
_MOST_NUMBERS = 81  # maximum number of cells that have room for their value
_DASHED: Mapping[str, Any] = {"color": BASELINE, "linestyle": (0, (5, 3)), "linewidth": 1.4}  # equal rates

Pair = tuple[float, float]  # eta_B, eta_A
Cells = dict[Pair, list[Setting]]
Values = Mapping[Pair, float]


def draw(results: SweepResults) -> style.Picture | None:
    """Draw a grid if most pairs of rates were run, otherwise points."""
    cells = _cells(results.settings)
    across, up = _axes_of(cells)
    best_of = {pair: _best_of(results, members) for pair, members in cells.items()}
    values = {pair: one.mean for pair, one in best_of.items() if one and one.mean is not None}
    one_ratio = len({one.ratio for one in results.settings}) == 1  # if True, other keys decide the rates
    if len(across) < 2 or len(up) < 2 or one_ratio or not values:
        return None
    low, high, beyond = style.robust_limits(values.values())
    full = len(cells) >= _FULL * len(across) * len(up)
    width = max(7.0, min(10.4, 2.6 + 0.95 * len(across))) if full else 8.0
    figure = style.new_figure(width, 5.6 if len(up) > 4 else 4.6)
    axes = figure.add_subplot()
    scale = _Scale(low, high if high > low else low + 1e-9, results.sweep.greater_is_better)
    (_grid if full else _points)(axes, results, cells, values, scale)
    axes.set_xlabel("η_B, rate of lora_B")
    axes.set_ylabel("η_A, rate of lora_A")
    bar = figure.colorbar(scale.mappable, ax=axes, pad=0.02, aspect=28, extend=_extend(values.values(), low, high))
    bar.set_label(f"{results.axis_label}: brighter")
    bar.outline.set_visible(False)
    if not results.sweep.greater_is_better:
        bar.ax.invert_yaxis()
    figure.legend(handles=_handles(results, values, cells, full), loc="outside lower center", ncols=3)
    return style.Picture("heatmap", "Both rates: η_A x η_B", _caption(cells, beyond, full), figure)


class _Scale:
    """Colours of a metric between robust limits. The best value has the brightest colour."""

    def __init__(self, low: float, high: float, greater_is_better: bool) -> None:
        colours = matplotlib.colormaps["viridis" if greater_is_better else "viridis_r"]
        self.mappable: Any = ScalarMappable(Normalize(low, high, clip=True), colours)

    def colour(self, value: float) -> Any:
        return self.mappable.to_rgba(value)

    def ink_on(self, value: float) -> str:
        """Return black or white: the one that is legible on the value's colour."""
        red, green, blue, _ = self.colour(value)
        return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"


def _grid(axes: Any, results: SweepResults, cells: Cells, values: Values, scale: _Scale) -> None:
    """Draw cells of equal size, also for rates at unequal distances."""
    across, up = _axes_of(cells)
    places = {pair: (across.index(pair[0]), up.index(pair[1])) for pair in cells}
    numbers = len(across) * len(up) <= _MOST_NUMBERS
    for pair, place in places.items():
        if pair not in values:
            _hatch(axes, place, OTHERS, "////", zorder=1)
            continue
        colour, ink = scale.colour(values[pair]), scale.ink_on(values[pair])
        _square(axes, place, facecolor=colour, edgecolor=PAPER, linewidth=1.5, zorder=1)
        if any(one.failed for one in cells[pair]):
            _hatch(axes, place, ink, "//", zorder=2)
        if numbers:
            ground = {"facecolor": colour, "edgecolor": "none", "pad": 1.6}
            text = {"color": ink, "fontsize": 8.5, "ha": "center", "va": "center", "bbox": ground}
            axes.text(*place, measured(values[pair]), **text, zorder=6)
    _diagonal_between(axes, across, up)
    for pair, mark in _marks(results, values).items():
        _mark_cell(axes, places[pair], mark, scale.ink_on(values[pair]))
    axes.set_xlim(-0.52, len(across) - 0.48)
    axes.set_ylim(-0.52, len(up) - 0.48)
    axes.set_xticks(range(len(across)), [short(rate) for rate in across])
    axes.set_yticks(range(len(up)), [short(rate) for rate in up])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _square(axes: Any, place: tuple[int, int], inset: float = 0.0, **look: Any) -> None:
    x, y = (at - 0.5 + inset for at in place)
    axes.add_patch(Rectangle((x, y), 1 - 2 * inset, 1 - 2 * inset, **look))


def _hatch(axes: Any, place: tuple[int, int], colour: str, hatch: str, *, zorder: int) -> None:
    _square(axes, place, facecolor="none", edgecolor=colour, hatch=hatch, linewidth=0, zorder=zorder)


def _mark_cell(axes: Any, place: tuple[int, int], mark: str, ink: str) -> None:
    if mark == "near":
        axes.plot([place[0] + 0.38], [place[1] + 0.34], "o", markersize=4.5, color=ink, zorder=6)
        return
    dashed = mark == "diagonal"
    # A dark ring with a light ring inside, because one of them is visible on every colour.
    outer, line = (BASELINE if dashed else "#000000"), ((0, (3, 1.4)) if dashed else "solid")
    for inset, colour, width in ((0.035, outer, 3.4), (0.075, "#ffffff", 1.4)):
        _square(axes, place, inset, facecolor="none", edgecolor=colour, linewidth=width, linestyle=line, zorder=5)


def _diagonal_between(axes: Any, across: Sequence[float], up: Sequence[float]) -> None:
    """Draw the line of equal rates through evenly spaced cells."""
    low, high = max(across[0], up[0]), min(across[-1], up[-1])
    if low > high:
        return
    rates = numpy.unique(
        numpy.concatenate([numpy.geomspace(low, high, 60), [r for r in (*across, *up) if low <= r <= high]])
    )
    x = numpy.interp(numpy.log(rates), numpy.log(across), numpy.arange(len(across)))
    y = numpy.interp(numpy.log(rates), numpy.log(up), numpy.arange(len(up)))
    # The cells at both ends extend half a cell beyond their rates.
    x, y = ([line[0] - 0.5, *line, line[-1] + 0.5] for line in (x, y))
    axes.plot(x, y, color=PAPER, linewidth=3.2, alpha=0.9, zorder=3, solid_capstyle="butt")
    axes.plot(x, y, **_DASHED, zorder=4)


def _points(axes: Any, results: SweepResults, cells: Cells, values: Values, scale: _Scale) -> None:
    """Draw points on log axes, with lines of equal ratio."""
    across, up = _axes_of(cells)
    axes.set_xscale("log")
    axes.set_yscale("log")
    room = (across[-1] / across[0]) ** 0.07, (up[-1] / up[0]) ** 0.12
    axes.set_xlim(across[0] / room[0], across[-1] * room[0])
    axes.set_ylim(up[0] / room[1], up[-1] * room[1])
    style.log_ticks(axes.xaxis, across)
    style.log_ticks(axes.yaxis, up)
    _lines_of_ratio(axes, cells)
    size = 210 if len(cells) <= 40 else 90 if len(cells) <= 120 else 40
    for pair in cells:
        known = pair in values
        look = {"color": [scale.colour(values[pair])], "linewidths": 1.2} if known else {"color": MUTED, "marker": "X"}
        axes.scatter(*pair, s=size, edgecolors=PAPER, zorder=4, **look)
    rings: dict[str, dict[str, Any]] = {
        "best": {"edgecolors": INK},
        "diagonal": {"edgecolors": BASELINE, "linestyles": [(0, (2, 1))]},
    }
    for pair, mark in _marks(results, values).items():
        if mark == "near":
            axes.scatter(*pair, s=size / 10, color=scale.ink_on(values[pair]), zorder=6)
        else:
            axes.scatter(*pair, s=size * 2.1, linewidths=2.4, facecolors="none", zorder=5, **rings[mark])


def _lines_of_ratio(axes: Any, cells: Cells) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ratios = sorted({float(f"{pair[0] / pair[1]:.4g}") for pair in cells})
    for ratio in ratios if len(ratios) <= 12 else [ratio for ratio in ratios if ratio == 1]:
        line = _DASHED if ratio == 1 else {"color": OTHERS, "linewidth": 0.9}
        axes.plot([left, right], [left / ratio, right / ratio], zorder=2, **line)
        x = min(right, top * ratio)
        if max(left, bottom * ratio) < x:
            at_top = top * ratio < right
            axes.annotate(
                f"ratio {short(ratio)}",
                (x, x / ratio),
                xytext=(0, 3) if at_top else (3, 0),
                textcoords="offset points",
                ha="center" if at_top else "left",
                va="bottom" if at_top else "center",
                fontsize=8,
                color=BASELINE if ratio == 1 else MUTED,
                annotation_clip=False,
            )


def _marks(results: SweepResults, values: Values) -> dict[Pair, str]:
    """Return a mark for some pairs of rates.

    `best` is the best setting, `diagonal` the best at ratio 1, and `near` is within 1% of the best.
    """
    best, baseline = results.outcome.best, results.outcome.baseline
    if best is None or best.mean is None or best.rates is None:
        return {}
    marks = {pair: "near" for pair, value in values.items() if is_near(value, best.mean)}
    if baseline is not None and (pair := _pair(baseline)) is not None:
        marks[pair] = "diagonal"
    if (pair := _pair(best)) is not None:
        marks[pair] = "best"
    return marks


def _handles(results: SweepResults, values: Values, cells: Cells, full: bool) -> list[Any]:
    """Return the legend's entries for the marks that the figure has."""
    marks = set(_marks(results, values).values())
    ring: dict[str, Any] = {"edgecolor": BASELINE, "linewidth": 2.4, "linestyle": (0, (2, 1))}
    dot: dict[str, Any] = {"color": INK, "marker": "o", "markersize": 4.5, "linestyle": ""}
    cross: dict[str, Any] = {"color": MUTED, "marker": "X", "markersize": 9, "linestyle": ""}
    failed = any(one.failed for members in cells.values() for one in members)
    entries: tuple[tuple[bool, Any], ...] = (
        (True, Line2D([], [], label="η_A = η_B: plain LoRA", **_DASHED)),
        ("best" in marks, Patch(facecolor="none", edgecolor=INK, linewidth=2.4, label="best")),
        ("diagonal" in marks, Patch(facecolor="none", label="best of plain LoRA", **ring)),
        ("near" in marks, Line2D([], [], label="within 1% of the best", **dot)),
        (not full and len(values) < len(cells), Line2D([], [], label="no result", **cross)),
        (full and failed, Patch(facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0, label="failed")),
    )
    return [handle for applies, handle in entries if applies]


def _caption(cells: Cells, beyond: int, full: bool) -> str:
    caption = "Below the dashed line lora_B has a larger rate than lora_A (LoRA+), above it a smaller rate."
    if any(len(members) > 1 for members in cells.values()):
        caption += " If several settings have the same pair of rates, the best is shown."
    if not full:
        caption += " Grey lines: pairs with the same ratio."
    if beyond:
        caption += f" {beyond} value{'s' if beyond > 1 else ''} beyond the scale have the colour of the scale's end."
    return caption


def _axes_of(cells: Cells) -> tuple[list[float], list[float]]:
    """Return the distinct rates of lora_B and of lora_A."""
    return sorted({pair[0] for pair in cells}), sorted({pair[1] for pair in cells})


def _cells(settings: Sequence[Setting]) -> Cells:
    """Group the settings by their rates."""
    cells: Cells = {}
    for one in settings:
        if (pair := _pair(one)) is not None:
            cells.setdefault(pair, []).append(one)
    return cells


def _pair(setting: Setting) -> Pair | None:
    rates = setting.rates
    return None if rates is None else (float(f"{rates.lr_B:.4g}"), float(f"{rates.lr_A:.4g}"))


def _best_of(results: SweepResults, members: Sequence[Setting]) -> Setting | None:
    return next((one for one in results.outcome.ranked if any(one is member for member in members)), None)


def _extend(values: Iterable[float], low: float, high: float) -> str:
    below, above = any(value < low for value in values), any(value > high for value in values)
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
