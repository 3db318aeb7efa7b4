"""The plane of heatmap.png: its axes, the place of each setting, and lines of equal alpha or eta_B.

For PEFT's start (B = 0), LoRA+ with alpha and a ratio is plain LoRA with alpha x ratio at lr = eta_A. So each plane is
also one of lr and alpha for plain LoRA: the ratio decides alpha, and eta_A is lr. See docs/explained/invariance.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from loraplus_hydra.loraplus.scale_free import is_scale_free
from loraplus_hydra.report.settings import Setting
from loraplus_hydra.report.values import number

FULL = 0.6  # minimum share of existing cells for a grid
_EVEN = 0.2  # maximum difference of two steps, as a share of the larger one, on axes with equal steps
Pair = tuple[float, float]  # the place across and the place up
Cells = dict[Pair, list[Setting]]


@dataclass(frozen=True)
class Axis:
    """The values of an axis, drawn at equal distances: the first at 0, the second at 1."""

    values: tuple[float, ...]

    @functools.cached_property
    def knots(self) -> tuple[Any, Any]:
        """The places and the logarithms of all values, and of both ends half a cell outside."""
        logs = numpy.log(self.values)
        ends = logs[0] - (logs[1] - logs[0]) / 2, logs[-1] + (logs[-1] - logs[-2]) / 2
        places = numpy.arange(len(logs), dtype=float)
        return numpy.array([-0.5, *places, len(logs) - 0.5]), numpy.array([ends[0], *logs, ends[1]])

    def place(self, log: Any) -> Any:
        """Return the place of a value's logarithm."""
        places, logs = self.knots
        return numpy.interp(log, logs, places)


@dataclass(frozen=True)
class Plane:
    """The settings of a sweep by eta_A and eta_B, or by eta_A and the ratio."""

    by_ratio: bool  # True: the ratio is across, False: eta_B is across; eta_A is always up
    cells: Cells
    alpha: float | None  # lora_alpha of all settings; None if they have no known equal runs of plain LoRA

    @functools.cached_property
    def across(self) -> Axis:
        return Axis(tuple(sorted({pair[0] for pair in self.cells})))

    @functools.cached_property
    def up(self) -> Axis:
        return Axis(tuple(sorted({pair[1] for pair in self.cells})))

    @property
    def share(self) -> float:
        """Share of the grid's cells that were run."""
        return len(self.cells) / (len(self.across.values) * len(self.up.values)) if self.cells else 0.0

    @property
    def is_even(self) -> bool:
        """Return True if both axes have about the same step, so that equal settings lie on a diagonal."""
        steps = numpy.diff(numpy.log(self.across.values)), numpy.diff(numpy.log(self.up.values))
        low, high = min(map(numpy.min, steps)), max(map(numpy.max, steps))
        return bool(low >= (1 - _EVEN) * high)

    def pair(self, setting: Setting) -> Pair | None:
        """Return the setting's place, rounded because rates can differ by rounding errors."""
        return _pair(setting, self.by_ratio)

    def line_of_ratio(self, ratio: float) -> Any:
        """Return the line of one ratio over places in the grid, for a plane of eta_A and eta_B."""
        return self._line(numpy.log(ratio), 1)

    def line_of_eta_b(self, eta_b: float) -> Any:
        """Return the line of one eta_B over places in the grid, for a plane of eta_A and the ratio."""
        return self._line(numpy.log(eta_b), -1)

    def _line(self, at_one: float, slope: int) -> Any:
        """Return the places of `log across = at_one + slope x log up` inside the grid.

        It is straight between the values of both axes, so these places and the grid's edges are enough.
        """
        logs = numpy.unique([*self.up.knots[1], *((log - at_one) * slope for log in self.across.knots[1])])
        low, high = self.up.knots[1][[0, -1]]
        left, right = self.across.knots[1][[0, -1]]
        over = at_one + slope * logs
        edge = 1e-9  # a line through a corner of the grid
        inside = (logs > low - edge) & (logs < high + edge) & (over > left - edge) & (over < right + edge)
        line = numpy.array([self.across.place(over[inside]), self.up.place(logs[inside])])
        return line if slope == 1 else line[:, ::-1]  # from left to right


def plane_of(settings: Sequence[Setting]) -> Plane:
    """Return the plane of both rates, or of eta_A and the ratio if this one has fewer empty cells."""
    alpha = _alpha(settings)
    rates, ratio = (Plane(by_ratio, _cells(settings, by_ratio), alpha) for by_ratio in (False, True))
    return ratio if ratio.share >= FULL and ratio.share > rates.share else rates


def _cells(settings: Sequence[Setting], by_ratio: bool) -> Cells:
    cells: Cells = {}
    for one in settings:
        if (pair := _pair(one, by_ratio)) is not None:
            cells.setdefault(pair, []).append(one)
    return cells


def _pair(setting: Setting, by_ratio: bool) -> Pair | None:
    rates = setting.rates
    if rates is None:
        return None
    return (float(f"{(rates.ratio if by_ratio else rates.lr_B):.4g}"), float(f"{rates.lr_A:.4g}"))


def _alpha(settings: Sequence[Setting]) -> float | None:
    """Return lora_alpha of all settings, if each one is equal to a run of plain LoRA with lr = eta_A."""
    configs = [job.config for one in settings for job in one.jobs if job.config]
    alphas = {number(config.get("adapter.lora_alpha")) for config in configs}
    equal = all(
        config.get("adapter._target_") == "peft.LoraConfig"
        and config.get("adapter.init_lora_weights", True) is True
        and is_scale_free(str(config.get("optimizer._target_")).rpartition(".")[2])
        for config in configs
    )
    return alphas.pop() if equal and len(alphas) == 1 else None
