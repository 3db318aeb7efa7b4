"""Limits of a scale that a few diverged values don't stretch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy


def robust_limits(values: Iterable[float], always: Iterable[float] = ()) -> tuple[float, float, int]:
    """Return the ends of a scale, and the number of values beyond it.

    A value is beyond the scale if its distance from the middle 80% of the values is more than 1.5 times the width of
    that range. So a diverged job does not flatten the other jobs' curves. The values in `always` are on the scale.
    """
    known = numpy.asarray(list(values), dtype=float)
    if not len(known):
        return 0.0, 1.0, 0
    inner, outer = numpy.quantile(known, [0.1, 0.9])
    room = 1.5 * (outer - inner)
    if not room:  # if most values are equal, all values stay on the scale
        room = 1.5 * float(numpy.ptp(known))
    shown = [*known[(known >= inner - room) & (known <= outer + room)], *always]
    low, high = float(min(shown)), float(max(shown))
    return low, high, int(((known < low) | (known > high)).sum())


def beyond_axis(points: int) -> str:
    """Return a caption's sentence about points beyond the axis; empty for none."""
    if not points:
        return ""
    return f" {points} point{' lies' if points == 1 else 's lie'} beyond the axis."


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Return limits of an axis with some room at both ends."""
    room = (high - low) * share or abs(high) * 0.02 or 1.0
    return low - room, high + room
