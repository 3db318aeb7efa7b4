"""heatmap.png: the metric over both rates, eta_A x eta_B, with the diagonal that plain LoRA is confined to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraplus_hydra.report.compare import is_near
from loraplus_hydra.report.figures.style import (
    BASELINE,
    INK,
    MUTED,
    OTHERS,
    PAPER,
    Picture,
    log_ticks,
    new_figure,
    robust_limits,
)
from loraplus_hydra.report.formatting import measured, short
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting

_FULL = 0.6  # share of cells that must be there for a grid; below it the points stand alone on log axes
_MOST_NUMBERS = 81  # cells that still have room for their number

Cells = dict[tuple[float, float], list[Setting]]


def draw(results: SweepResults) -> Picture | None:
    """A grid of cells where the sweep is one, points on log axes where it isn't (a ratio x lr sweep, a search)."""
    cells = _cells(results.settings)
    across = sorted({pair[0] for pair in cells})
    up = sorted({pair[1] for pair in cells})
    best_of = {pair: _best_of(results, members) for pair, members in cells.items()}
    values = {pair: one.mean for pair, one in best_of.items() if one is not None and one.mean is not None}
    one_ratio = len({one.ratio for one in results.settings}) == 1  # then other keys decide the rates
    if len(across) < 2 or len(up) < 2 or one_ratio or not values:
        return None
    low, high, beyond = robust_limits(values.values())
    full = len(cells) >= _FULL * len(across) * len(up)
    figure = new_figure(max(7.0, min(10.4, 2.6 + 0.95 * len(across))) if full else 8.0, 5.6 if len(up) > 4 else 4.6)
    axes = figure.add_subplot()
    scale = _Scale(low, high if high > low else low + 1e-9, results.sweep.greater_is_better)
    (_grid if full else _points)(axes, results, cells, values, scale)
    axes.set_xlabel("η_B, rate of lora_B")
    axes.set_ylabel("η_A, rate of lora_A")
    bar = figure.colorbar(scale.mappable(), ax=axes, pad=0.02, aspect=28, extend=_extend(values.values(), low, high))
    bar.set_label(f"{results.sweep.metric}, {results.better} is better: brighter")
    bar.outline.set_visible(False)
    if not results.sweep.greater_is_better:
        bar.ax.invert_yaxis()
    figure.legend(handles=_handles(results, values, cells, full), loc="outside lower center", ncols=3)
    caption = _caption(results, cells, beyond, full)
    return Picture("heatmap", "Both rates: η_A x η_B", caption, figure)


class _Scale:
    """Colours of a metric between robust limits: the brightest of viridis is the best."""

    def __init__(self, low: float, high: float, greater_is_better: bool) -> None:
        import matplotlib
        from matplotlib.colors import Normalize

        self.normal = Normalize(low, high, clip=True)
        self.map = matplotlib.colormaps["viridis" if greater_is_better else "viridis_r"]

    def colour(self, value: float) -> Any:
        return self.map(self.normal(value))

    def ink_on(self, value: float) -> str:
        """Black or white, whichever can be read on the value's colour."""
        red, green, blue, _ = self.colour(value)
        return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"

    def mappable(self) -> Any:
        from matplotlib.cm import ScalarMappable

        return ScalarMappable(self.normal, self.map)


def _grid(axes: Any, results: SweepResults, cells: Cells, values: Mapping[Any, float], scale: _Scale) -> None:
    """Cells of one size, whatever the steps between the rates; the diagonal goes where both rates are equal."""
    from matplotlib.patches import Rectangle

    across = sorted({pair[0] for pair in cells})
    up = sorted({pair[1] for pair in cells})
    numbers = len(across) * len(up) <= _MOST_NUMBERS
    places = {pair: (across.index(pair[0]), up.index(pair[1])) for pair in cells}
    for pair, (x, y) in places.items():
        corner = (x - 0.5, y - 0.5)
        value = values.get(pair)
        if value is None:
            axes.add_patch(
                Rectangle(corner, 1, 1, facecolor="none", edgecolor=OTHERS, hatch="////", linewidth=0, zorder=1)
            )
            continue
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=scale.colour(value), edgecolor=PAPER, linewidth=1.5, zorder=1))
        if any(one.failed for one in cells[pair]):
            axes.add_patch(
                Rectangle(
                    corner, 1, 1, facecolor="none", edgecolor=scale.ink_on(value), hatch="//", linewidth=0, zorder=2
                )
            )
        if numbers:
            ground = {"facecolor": scale.colour(value), "edgecolor": "none", "pad": 1.6}
            text = {"color": scale.ink_on(value), "fontsize": 8.5, "ha": "center", "va": "center", "bbox": ground}
            axes.text(x, y, measured(value), **text, zorder=6)
    _diagonal_between(axes, across, up)
    for pair, mark in _marks(results, values).items():
        x, y = places[pair]
        if mark == "near":
            axes.plot([x + 0.38], [y + 0.34], "o", markersize=4.5, color=scale.ink_on(values[pair]), zorder=6)
            continue
        for inset, colour, width in ((0.035, "#000000", 3.4), (0.075, "#ffffff", 1.4)):
            ring = Rectangle((x - 0.5 + inset, y - 0.5 + inset), 1 - 2 * inset, 1 - 2 * inset, facecolor="none")
            ring.set(edgecolor=colour, linewidth=width, zorder=5)
            if mark == "diagonal":
                ring.set(edgecolor=BASELINE if width > 2 else colour, linestyle=(0, (3, 1.4)))
            axes.add_patch(ring)
    axes.set_xlim(-0.52, len(across) - 0.48)
    axes.set_ylim(-0.52, len(up) - 0.48)
    axes.set_xticks(range(len(across)), [short(rate) for rate in across])
    axes.set_yticks(range(len(up)), [short(rate) for rate in up])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _diagonal_between(axes: Any, across: Sequence[float], up: Sequence[float]) -> None:
    """The line of equal rates, through cells that stand at their places and not at their rates."""
    import numpy

    low, high = max(across[0], up[0]), min(across[-1], up[-1])
    if low > high:
        return
    rates = numpy.unique(
        numpy.concatenate([numpy.geomspace(low, high, 60), [r for r in (*across, *up) if low <= r <= high]])
    )
    x = numpy.interp(numpy.log(rates), numpy.log(across), numpy.arange(len(across)))
    y = numpy.interp(numpy.log(rates), numpy.log(up), numpy.arange(len(up)))
    # Half a cell further at both ends, where the line goes on along the cells' own diagonal.
    x, y = ([line[0] - 0.5, *line, line[-1] + 0.5] for line in (x, y))
    axes.plot(x, y, color=PAPER, linewidth=3.2, alpha=0.9, zorder=3, solid_capstyle="butt")
    axes.plot(x, y, color=BASELINE, linewidth=1.4, linestyle=(0, (5, 3)), zorder=4)


def _points(axes: Any, results: SweepResults, cells: Cells, values: Mapping[Any, float], scale: _Scale) -> None:
    """Points at their rates on log axes, with lines of equal ratio."""
    across = sorted({pair[0] for pair in cells})
    up = sorted({pair[1] for pair in cells})
    axes.set_xscale("log")
    axes.set_yscale("log")
    room = (across[-1] / across[0]) ** 0.07, (up[-1] / up[0]) ** 0.12
    axes.set_xlim(across[0] / room[0], across[-1] * room[0])
    axes.set_ylim(up[0] / room[1], up[-1] * room[1])
    log_ticks(axes.xaxis, across)
    log_ticks(axes.yaxis, up)
    _lines_of_ratio(axes, cells)
    size = 210 if len(cells) <= 40 else 90 if len(cells) <= 120 else 40
    for pair in cells:
        if pair not in values:
            axes.scatter(*pair, s=size, marker="X", color=MUTED, edgecolors=PAPER, zorder=4)
            continue
        axes.scatter(*pair, s=size, color=[scale.colour(values[pair])], edgecolors=PAPER, linewidths=1.2, zorder=4)
    for pair, mark in _marks(results, values).items():
        if mark == "near":
            axes.scatter(*pair, s=size / 10, color=scale.ink_on(values[pair]), zorder=6)
            continue
        style = {"linewidths": 2.4, "facecolors": "none", "zorder": 5}
        if mark == "best":
            axes.scatter(*pair, s=size * 2.1, edgecolors=INK, **style)
        else:
            axes.scatter(*pair, s=size * 2.1, edgecolors=BASELINE, linestyles=[(0, (2, 1))], **style)


def _lines_of_ratio(axes: Any, cells: Cells) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ratios = sorted({float(f"{pair[0] / pair[1]:.4g}") for pair in cells})
    for ratio in ratios if len(ratios) <= 12 else [ratio for ratio in ratios if ratio == 1]:
        line = {"color": BASELINE, "linestyle": (0, (5, 3)), "linewidth": 1.4} if ratio == 1 else {"color": OTHERS}
        axes.plot([left, right], [left / ratio, right / ratio], **{"linewidth": 0.9, "zorder": 2, **line})
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


def _marks(results: SweepResults, values: Mapping[Any, float]) -> dict[tuple[float, float], str]:
    """Pair of rates -> `best`, `diagonal` (the best there) or `near` (within 1% of the best)."""
    best, baseline = results.outcome.best, results.outcome.baseline
    if best is None or best.mean is None or best.rates is None:
        return {}
    marks = {pair: "near" for pair, value in values.items() if is_near(value, best.mean)}
    if baseline is not None and (pair := _pair(baseline)) is not None:
        marks[pair] = "diagonal"
    if (pair := _pair(best)) is not None:
        marks[pair] = "best"
    return marks


def _handles(results: SweepResults, values: Mapping[Any, float], cells: Cells, full: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks = set(_marks(results, values).values())
    dashed: dict[str, Any] = {"color": BASELINE, "linestyle": (0, (5, 3)), "linewidth": 1.4}
    handles: list[Any] = [Line2D([], [], label="η_A = η_B: plain LoRA", **dashed)]
    if "best" in marks:
        handles.append(Patch(facecolor="none", edgecolor=INK, linewidth=2.4, label="best"))
    if "diagonal" in marks:
        ring: dict[str, Any] = {"edgecolor": BASELINE, "linewidth": 2.4, "linestyle": (0, (2, 1))}
        handles.append(Patch(facecolor="none", label="best of plain LoRA", **ring))
    if "near" in marks:
        handles.append(
            Line2D([], [], color=INK, marker="o", linestyle="", markersize=4.5, label="within 1% of the best")
        )
    if not full and len(values) < len(cells):
        handles.append(Line2D([], [], color=MUTED, marker="X", linestyle="", markersize=9, label="no result"))
    if full and any(one.failed for members in cells.values() for one in members):
        handles.append(Patch(facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0, label="failed"))
    return handles


def _caption(results: SweepResults, cells: Cells, beyond: int, full: bool) -> str:
    caption = "Below the dashed line lora_B learns faster than lora_A (LoRA+), above it slower."
    if any(len(members) > 1 for members in cells.values()):
        caption += " Several settings share a pair of rates: the best of them is shown."
    if not full:
        caption += " Grey lines: pairs of one ratio."
    if beyond:
        caption += (
            f" {beyond} far value{'s' if beyond > 1 else ''} would have spoilt the colours: the scale ends before "
            "and such a cell has its end's colour."
        )
    return caption


def _cells(settings: Sequence[Setting]) -> Cells:
    """(eta_B, eta_A) -> the settings with these rates."""
    cells: Cells = {}
    for one in settings:
        if (pair := _pair(one)) is not None:
            cells.setdefault(pair, []).append(one)
    return cells


def _pair(setting: Setting) -> tuple[float, float] | None:
    rates = setting.rates
    return None if rates is None else (float(f"{rates.lr_B:.4g}"), float(f"{rates.lr_A:.4g}"))


def _best_of(results: SweepResults, members: Sequence[Setting]) -> Setting | None:
    return next((one for one in results.outcome.ranked if any(one is member for member in members)), None)


def _extend(values: Any, low: float, high: float) -> str:
    below, above = any(value < low for value in values), any(value > high for value in values)
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
