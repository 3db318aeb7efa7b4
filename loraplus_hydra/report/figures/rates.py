"""heatmap.png: the metric for each pair of rates, eta_A with eta_B or with the ratio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from loraplus_hydra.report.figures import style
from loraplus_hydra.report.figures.plane import FULL, Pair, Plane, plane_of
from loraplus_hydra.report.figures.style import BASELINE, BASELINE_TEXT, GRID, INK, MUTED, OTHERS, PAPER, ink_on
from loraplus_hydra.report.formatting import measured, short
from loraplus_hydra.report.limits import robust_limits
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import Setting
from loraplus_hydra.report.summary import rule_of

_DARKEST = 0.37  # place in viridis; darker colours would hardly differ from a dark page
_LONG_TEXT = 6.0  # inches; a narrower figure has no room for a long line of text
_NARROW_ROOM, _NARROW_CELL = 1.1, 0.56  # inches, on a phone: beside the cells, and for each column
_MOST_NUMBERS = 81  # maximum number of cells that have room for their value
_MOST_LINES = 16  # maximum number of light lines that have room for their label
_MOST_RATIOS = 12  # the same beside points
_DASHED: Mapping[str, Any] = {"color": BASELINE, "linestyle": (0, (5, 3)), "linewidth": 1.4}  # equal rates
_LIGHT: Mapping[str, Any] = {"color": OTHERS, "linewidth": 1.1}  # equal alpha, or equal eta_B
_EQUAL_RUN = "lora_alpha of the equal run of plain LoRA, with lr = η_A"

Values = Mapping[Pair, float]


def draw(results: SweepResults, *, narrow: bool = False) -> style.Picture | None:
    """Draw a grid if most pairs of rates were run, otherwise points."""
    plane = plane_of(results.settings)
    best_of = {pair: _best_of(results, members) for pair, members in plane.cells.items()}
    values = {pair: one.mean for pair, one in best_of.items() if one and one.mean is not None}
    one_ratio = len({one.ratio for one in results.settings}) == 1  # if True, other keys decide the rates
    columns, rows = len(plane.across.values), len(plane.up.values)
    if columns < 2 or rows < 2 or one_ratio or not values:
        return None
    low, high, beyond = robust_limits(values.values())
    full = plane.share >= FULL  # otherwise points on log axes
    figure = _figure(columns if full else 0, rows, narrow=narrow)
    axes = figure.add_subplot()
    scale = _Scale(low, high if high > low else low + (0.01 * abs(low) or 1.0), results.sweep.greater_is_better)
    lines = (_grid if full else _points)(axes, results, plane, values, scale)
    axes.set_xlabel("ratio, η_B / η_A" if plane.by_ratio else "η_B, rate of lora_B")
    axes.set_ylabel("η_A, rate of lora_A")
    if len(values) > 1:
        _colour_bar(figure, axes, results, scale, _extend(values.values(), low, high), narrow=narrow)
    handles = _handles(results, values, plane, full, lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if narrow else 3)
    title = "Both rates: η_A x ratio" if plane.by_ratio else "Both rates: η_A x η_B"
    return style.Picture("heatmap", title, _caption(results, plane, beyond, full, lines), figure)


def _figure(columns: int, rows: int, *, narrow: bool) -> Any:
    """Return a figure with room for a grid; `columns` is 0 for points."""
    if narrow:
        return style.new_figure(max(style.NARROW, _NARROW_ROOM + _NARROW_CELL * columns), 5.0 if rows > 4 else 4.5)
    width = max(7.0, min(10.4, 2.6 + 0.95 * columns)) if columns else 8.0
    return style.new_figure(width, 5.6 if rows > 4 else 4.6)


def _colour_bar(figure: Any, axes: Any, results: SweepResults, scale: _Scale, extend: str, *, narrow: bool) -> None:
    place = {"location": "bottom"} if narrow else {"pad": 0.02}
    bar = figure.colorbar(scale.mappable, ax=axes, aspect=28, extend=extend, **place)
    bar.set_label(f"{results.axis_label}: brighter")
    bar.outline.set_visible(False)
    if not results.sweep.greater_is_better and not narrow:
        bar.ax.invert_yaxis()


class _Scale:
    """Colours of a metric between robust limits. The best value has the brightest colour."""

    def __init__(self, low: float, high: float, greater_is_better: bool) -> None:
        colours = ListedColormap(matplotlib.colormaps["viridis"](numpy.linspace(_DARKEST, 1, 256)))
        mapped = colours if greater_is_better else colours.reversed()
        self.mappable: Any = ScalarMappable(Normalize(low, high, clip=True), mapped)

    def colour(self, value: float) -> Any:
        return self.mappable.to_rgba(value)

    def ink_on(self, value: float) -> str:
        """Return black or white: the one that is legible on the value's colour."""
        return ink_on(self.colour(value))


def _grid(axes: Any, results: SweepResults, plane: Plane, values: Values, scale: _Scale) -> bool:
    """Draw cells of equal size, also for rates at unequal distances.

    Returns True if light lines were drawn.
    """
    across, up = plane.across.values, plane.up.values
    places = {pair: (across.index(pair[0]), up.index(pair[1])) for pair in plane.cells}
    numbers = len(across) * len(up) <= _MOST_NUMBERS
    lines = plane.is_even and (_lines_of_eta_b(axes, plane) if plane.by_ratio else _lines_of_alpha(axes, plane))
    for pair, place in places.items():
        if pair not in values:
            if step := _left_at(plane.cells[pair]):
                _square(axes, place, facecolor=GRID, edgecolor=PAPER, linewidth=1.5, zorder=1)
                if numbers:
                    _write_number(axes, place, f"left at\n{step:,}", "", GRID, INK)
            else:
                _hatch(axes, place, OTHERS, "////", zorder=1)
            continue
        colour, ink = scale.colour(values[pair]), scale.ink_on(values[pair])
        _square(axes, place, facecolor=colour, edgecolor=PAPER, linewidth=1.5, zorder=1)
        if any(one.failed for one in plane.cells[pair]):
            _hatch(axes, place, ink, "//", zorder=2)
        if numbers:
            second = "" if lines else _second_text(plane, pair)
            _write_number(axes, place, measured(values[pair]), second, colour, ink)
    axes.set_xlim(-0.52, len(across) - 0.48)
    axes.set_ylim(-0.52, len(up) - 0.48)
    axes.set_xticks(range(len(across)), [_column_label(plane, value) for value in across])
    axes.set_yticks(range(len(up)), [short(rate) for rate in up])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if plane.by_ratio:
        _alpha_at_the_top(axes, plane)
    else:
        _line_of_equal_rates(axes, plane)
    for pair, mark in _marks(results, values, plane).items():
        _mark_cell(axes, places[pair], mark, scale.ink_on(values[pair]), left=not plane.by_ratio)
    return lines


def _left_at(members: Sequence[Setting]) -> int | None:
    """Return the step at which the last setting of a cell left a search; None if one didn't leave."""
    steps = [one.left_at for one in members]
    return None if None in steps else max(step for step in steps if step is not None)


def _write_number(axes: Any, place: tuple[int, int], number: str, second: str, colour: Any, ink: str) -> None:
    """Write a cell's number, and a second text below it, on a ground that hides the lines behind them."""
    x, y = place
    bottom = 0.37 if second else 0.23
    ground = Rectangle((x - 0.36, y - bottom), 0.72, bottom + 0.23, facecolor=colour, edgecolor="none", zorder=4.5)
    axes.add_patch(ground)
    text: dict[str, Any] = {"color": ink, "ha": "center", "va": "center", "zorder": 6}
    axes.text(x, y, number, fontsize=8.5, **text)
    if second:
        axes.text(x, y - 0.25, second, fontsize=7, **text)


def _second_text(plane: Plane, pair: Pair) -> str:
    """Return eta_B or plain LoRA's alpha of a cell, for grids without lines."""
    if plane.by_ratio:
        return f"η_B {short(float(f'{pair[0] * pair[1]:.4g}'))}"
    return "" if plane.alpha is None else f"alpha {short(plane.alpha * pair[0] / pair[1])}"


def _column_label(plane: Plane, value: float) -> str:
    return f"{short(value)}\nplain LoRA" if plane.by_ratio and value == 1 else short(value)


def _square(axes: Any, place: tuple[int, int], inset: float = 0.0, **look: Any) -> None:
    x, y = (at - 0.5 + inset for at in place)
    axes.add_patch(Rectangle((x, y), 1 - 2 * inset, 1 - 2 * inset, **look))


def _hatch(axes: Any, place: tuple[int, int], colour: str, hatch: str, *, zorder: int) -> None:
    _square(axes, place, facecolor="none", edgecolor=colour, hatch=hatch, linewidth=0, zorder=zorder)


def _mark_cell(axes: Any, place: tuple[int, int], mark: str, ink: str, *, left: bool) -> None:
    if mark == "near":
        # In the corner through which no line runs
        axes.plot([place[0] + (-0.38 if left else 0.38)], [place[1] + 0.34], "o", markersize=4.5, color=ink, zorder=6)
        return
    dashed = mark == "diagonal"
    # A dark ring with a light ring inside, because one of them is visible on every colour.
    outer, line = (BASELINE if dashed else "#000000"), ((0, (3, 1.4)) if dashed else "solid")
    for inset, colour, width in ((0.035, outer, 3.4), (0.075, "#ffffff", 1.4)):
        _square(axes, place, inset, facecolor="none", edgecolor=colour, linewidth=width, linestyle=line, zorder=5)


def _line_of_equal_rates(axes: Any, plane: Plane) -> None:
    line = plane.line_of_ratio(1.0)
    if line.shape[1] > 1:
        axes.plot(*line, color=PAPER, linewidth=3.2, alpha=0.9, zorder=3, solid_capstyle="butt")
        axes.plot(*line, **_DASHED, zorder=4)


def _alpha_at_the_top(axes: Any, plane: Plane) -> None:
    """Draw a second axis with plain LoRA's alpha for each ratio."""
    if plane.alpha is None:
        return
    top = axes.secondary_xaxis("top")
    top.set_xticks(range(len(plane.across.values)), [short(plane.alpha * ratio) for ratio in plane.across.values])
    top.tick_params(length=0)
    top.spines[:].set_visible(False)
    top.set_xlabel(_equal_run(axes), fontsize=9)


def _equal_run(axes: Any) -> str:
    return _EQUAL_RUN if axes.figure.get_figwidth() > _LONG_TEXT else _EQUAL_RUN.replace(" of plain", "\nof plain")


def _lines_of_alpha(axes: Any, plane: Plane) -> bool:
    """Draw lines of equal alpha of plain LoRA. Return False if there is no room or no such alpha."""
    across, up = plane.across.values, plane.up.values
    # The ratios of the last row and of the last column, because their lines end at different places
    ratios = sorted({float(f"{ratio:.4g}") for ratio in (*(x / up[-1] for x in across), *(across[-1] / y for y in up))})
    if plane.alpha is None or len(ratios) > _MOST_LINES:
        return False
    for ratio in ratios:
        line = plane.line_of_ratio(ratio)
        if ratio != 1:
            axes.plot(*line, **_LIGHT, zorder=2.5)
        at_top = line[0, -1] < len(across) - 0.6
        _label_end(
            axes, line, short(plane.alpha * ratio), (0, 3) if at_top else (4, 0), BASELINE_TEXT if ratio == 1 else MUTED
        )
    heading: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(_equal_run(axes), (0.5, 1), xytext=(0, 16), ha="center", va="bottom", fontsize=9, **heading)
    return True


def _lines_of_eta_b(axes: Any, plane: Plane) -> bool:
    """Draw lines of equal eta_B. Return False if there is no room."""
    across, up = plane.across.values, plane.up.values
    # The rates of the first row and of the last column, because their lines end at different places
    rates = sorted({float(f"{x * y:.4g}") for x, y in (*((x, up[0]) for x in across), *((across[-1], y) for y in up))})
    if len(rates) > _MOST_LINES:
        return False
    for eta_b in rates:
        line = plane.line_of_eta_b(eta_b)
        axes.plot(*line, **_LIGHT, zorder=2.5)
        at_right = line[1, -1] > -0.4
        _label_end(axes, line, short(eta_b), (4, 0) if at_right else (0, -3), MUTED)
    axes.tick_params(axis="x", pad=16)  # room for the lines' labels
    return True


def _label_end(axes: Any, line: Any, text: str, away: tuple[int, int], colour: str) -> None:
    """Write a label at a line's right end, moved by `away` in points."""
    axes.annotate(
        text,
        (line[0, -1], line[1, -1]),
        xytext=away,
        textcoords="offset points",
        ha="left" if away[0] else "center",
        va="center" if away[0] else "bottom" if away[1] > 0 else "top",
        fontsize=8,
        color=colour,
        annotation_clip=False,
    )


def _points(axes: Any, results: SweepResults, plane: Plane, values: Values, scale: _Scale) -> bool:
    """Draw points on log axes, with lines of equal ratio. Return True if they have plain LoRA's alpha."""
    cells, across, up = plane.cells, plane.across.values, plane.up.values
    axes.set_xscale("log")
    axes.set_yscale("log")
    room = (across[-1] / across[0]) ** 0.07, (up[-1] / up[0]) ** 0.12
    axes.set_xlim(across[0] / room[0], across[-1] * room[0])
    axes.set_ylim(up[0] / room[1], up[-1] * room[1])
    style.log_ticks(axes.xaxis, across)
    style.log_ticks(axes.yaxis, up)
    lines = _lines_of_ratio(axes, plane)
    size = 210 if len(cells) <= 40 else 90 if len(cells) <= 120 else 40
    for pair in cells:
        known = pair in values
        look = {"color": [scale.colour(values[pair])], "linewidths": 1.2} if known else {"color": MUTED, "marker": "X"}
        axes.scatter(*pair, s=size, edgecolors=PAPER, zorder=4, **look)
    rings: dict[str, dict[str, Any]] = {
        "best": {"edgecolors": INK},
        "diagonal": {"edgecolors": BASELINE, "linestyles": [(0, (2, 1))]},
    }
    for pair, mark in _marks(results, values, plane).items():
        if mark == "near":
            axes.scatter(*pair, s=size / 10, color=scale.ink_on(values[pair]), zorder=6)
        else:
            axes.scatter(*pair, s=size * 2.1, linewidths=2.4, facecolors="none", zorder=5, **rings[mark])
    return lines


def _lines_of_ratio(axes: Any, plane: Plane) -> bool:
    """Draw lines of equal ratio. Return True if all of them have plain LoRA's alpha."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ratios = sorted({float(f"{pair[0] / pair[1]:.4g}") for pair in plane.cells})
    room = len(ratios) <= _MOST_RATIOS
    for ratio in ratios if room else [ratio for ratio in ratios if ratio == 1]:
        line = _DASHED if ratio == 1 else {"color": OTHERS, "linewidth": 0.9}
        axes.plot([left, right], [left / ratio, right / ratio], zorder=2, **line)
        x = min(right, top * ratio)
        if max(left, bottom * ratio) < x:
            at_top = top * ratio < right
            alpha = "" if plane.alpha is None else f"\nalpha {short(plane.alpha * ratio)}"
            axes.annotate(
                f"ratio {short(ratio)}{alpha}",
                (x, x / ratio),
                xytext=(0, 3) if at_top else (3, 0),
                textcoords="offset points",
                ha="center" if at_top else "left",
                va="bottom" if at_top else "center",
                fontsize=8,
                color=BASELINE_TEXT if ratio == 1 else MUTED,
                annotation_clip=False,
            )
    return room and plane.alpha is not None


def _marks(results: SweepResults, values: Values, plane: Plane) -> dict[Pair, str]:
    """Return a mark for some pairs of rates.

    `best` is the best setting, `diagonal` the best at ratio 1, and `near` is about as good as the best.
    """
    best, baseline = results.outcome.best, results.outcome.baseline
    if best is None or best.mean is None or best.rates is None:
        return {}
    tolerance = results.outcome.tolerance
    marks = {pair: "near" for pair, value in values.items() if tolerance and tolerance.holds(value, best.mean)}
    if baseline is not None and (pair := plane.pair(baseline)) is not None:
        marks[pair] = "diagonal"
    if (pair := plane.pair(best)) is not None:
        marks[pair] = "best"
    return marks


def _handles(results: SweepResults, values: Values, plane: Plane, full: bool, lines: bool) -> list[Any]:
    """Return the legend's entries for the marks and lines that the figure has."""
    marks = set(_marks(results, values, plane).values())
    ring: dict[str, Any] = {"edgecolor": BASELINE, "linewidth": 2.4, "linestyle": (0, (2, 1))}
    dot: dict[str, Any] = {"color": INK, "marker": "o", "markersize": 4.5, "linestyle": ""}
    cross: dict[str, Any] = {"color": MUTED, "marker": "X", "markersize": 9, "linestyle": ""}
    left = [_left_at(members) is not None for pair, members in plane.cells.items() if pair not in values]
    failed = any(one.failed for pair in values for one in plane.cells[pair])
    hatched: dict[str, Any] = {"facecolor": "none", "linewidth": 0}
    equal = "equal η_B" if plane.by_ratio else "equal lora_alpha of plain LoRA"
    entries: tuple[tuple[bool, Any], ...] = (
        (not plane.by_ratio, Line2D([], [], label="η_A = η_B: plain LoRA", **_DASHED)),
        (full and lines, Line2D([], [], label=equal, **_LIGHT)),
        ("best" in marks, Patch(facecolor="none", edgecolor=INK, linewidth=2.4, label="best")),
        ("diagonal" in marks, Patch(facecolor="none", label="best of plain LoRA", **ring)),
        ("near" in marks, Line2D([], [], label="about as good as the best", **dot)),
        (not full and bool(left), Line2D([], [], label="no result", **cross)),
        (full and any(left), Patch(facecolor=GRID, edgecolor=OTHERS, label="left the search, at this step")),
        (full and not all(left), Patch(edgecolor=OTHERS, hatch="////", label="no result", **hatched)),
        (full and failed, Patch(edgecolor=MUTED, hatch="//", label="a job failed", **hatched)),
    )
    return [handle for applies, handle in entries if applies]


def _caption(results: SweepResults, plane: Plane, beyond: int, full: bool, lines: bool) -> str:
    if plane.by_ratio:
        caption = "A ratio above 1 gives lora_B a larger rate than lora_A (LoRA+)."
        caption += " Grey lines: equal η_B, with its value at the end." if lines else ""
    else:
        caption = "Below the dashed line lora_B has a larger rate than lora_A (LoRA+), above it a smaller rate."
    written = len(plane.across.values) * len(plane.up.values) <= _MOST_NUMBERS if full else lines
    if plane.alpha is not None and (written or lines or plane.by_ratio):
        place = "at the top" if full and plane.by_ratio else "at the end of its line" if lines else "in it"
        caption += (
            f" Each {'cell' if full else 'point'} is nearly the same training as a run of plain LoRA with lr = η_A and "
            f"the lora_alpha {place}, because B starts at zero."
        )
    if results.outcome.tolerance is not None:
        caption += f" About as good as the best: {rule_of(results.outcome.tolerance)}."
    if any(len(members) > 1 for members in plane.cells.values()):
        caption += " If several settings have the same pair of rates, the best is shown."
    if not full:
        caption += " Grey lines: pairs with the same ratio."
    if beyond:
        caption += f" {beyond} value{'s' if beyond > 1 else ''} beyond the scale have the colour of the scale's end."
    return caption


def _best_of(results: SweepResults, members: Sequence[Setting]) -> Setting | None:
    return next((one for one in results.outcome.ranked if any(one is member for member in members)), None)


def _extend(values: Iterable[float], low: float, high: float) -> str:
    below, above = any(value < low for value in values), any(value > high for value in values)
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
