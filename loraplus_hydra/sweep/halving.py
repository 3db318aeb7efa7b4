"""Successive halving: the rungs of a grid, and the candidates that stay at a rung.

A candidate is a setting of the grid, with a job for each seed. At each rung, the candidates with the lowest losses
stay. All candidates have the same seeds and rows, so losses are compared in pairs: seed with seed, row with row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from loraplus_hydra.io.rungs import Rung

_SHARES = (1 / 16, 1 / 4, 1 / 2)  # rungs, as shares of all steps
_LAST = 3 / 4  # the share of the last rung, for candidates that were as good as the best at half of the steps
_WITHIN = 2.0  # standard errors within which a candidate is as good as the last one kept
_MORE = 0.2  # the job-steps may exceed the plan by this share
_OF_GRID = 0.27  # and not this share of the full grid's steps, if the plan doesn't


@dataclass(frozen=True)
class Stop:
    """A planned rung."""

    step: int
    keep: int  # number of candidates that stay


@dataclass(frozen=True)
class Standing:
    """A candidate at a rung, compared with the last candidate that was to be kept."""

    name: str  # the values of its swept keys
    loss: float  # mean loss on the held-out rows of the rung
    metric: float | None  # task.metric, if it isn't the loss
    difference: float  # of the losses; above 0 is worse
    error: float  # standard error of the difference
    stays: bool  # False for a candidate that leaves


def first_share(candidates: int) -> float | None:
    """Return the share of the steps at which a grid's first rung is; None if there is nothing to decide."""
    return next((share for share, keep in zip(_SHARES, _keeps(candidates), strict=True) if keep < candidates), None)


def plan(candidates: int, steps: int, earliest: int) -> tuple[Stop, ...]:
    """Return the rungs of a grid whose jobs have `steps` steps.

    Rungs before the step `earliest` move to it. Of rungs at the same step, the last one counts. The last rung is nearer
    than 3/4 of the steps if two candidates can't be trained as far.
    """
    stops: dict[int, Stop] = {}
    for share, keep in zip(_SHARES, _keeps(candidates), strict=True):
        step = max(round(share * steps), earliest)
        if keep < candidates and step < steps:
            stops[step] = Stop(step, keep)
    if stops:
        before, planned = max(stops), tuple(stops.values())
        more = _most(candidates, planned, steps) - job_steps(candidates, planned, steps)
        last = min(max(round(_LAST * steps), earliest), before + math.floor(more + 1e-9))
        if before < last < steps:
            stops[last] = Stop(last, 1)
    return tuple(stops.values())


def job_steps(candidates: int, stops: Sequence[Stop], steps: int) -> int:
    """Return the planned number of steps of all candidates with one seed."""
    total, remaining, reached = 0, candidates, 0
    for stop in stops:
        total += remaining * (stop.step - reached)
        remaining, reached = min(remaining, stop.keep), stop.step
    return total + remaining * (steps - reached)


def _most(candidates: int, stops: Sequence[Stop], steps: int) -> float:
    """Return the largest number of steps, with one seed, that all candidates may take."""
    planned, of_grid = job_steps(candidates, stops, steps), _OF_GRID * candidates * steps
    return min((1 + _MORE) * planned, of_grid) if planned <= of_grid else (1 + _MORE) * planned


def places(candidates: int, stops: Sequence[Stop], steps: int, number: int, spent: float) -> int:
    """Return how many candidates may stay at rung `number` besides the planned ones.

    A place is left for each later rung with another one after it, because late rungs are closer to the end and decide
    better. `spent` is the number of steps, with one seed, that all candidates have taken up to this rung.
    """
    stop = stops[number]
    later = [replace(one, step=one.step - stop.step) for one in stops[number + 1 :]]
    planned = job_steps(stop.keep, later, steps - stop.step)
    until = later[0].step if later else steps - stop.step
    reserved = sum(after.step - one.step for one, after in pairwise(later))
    left = _most(candidates, stops, steps) - spent - planned - reserved
    return max(0, math.floor(left / until + 1e-9))


def decide(
    rungs: Mapping[str, Sequence[Rung]], keep: int, more: int, *, greater_is_better: bool = False
) -> list[Standing]:
    """Return the candidates in the order of their metrics, the best first.

    Of equal ones, the lower loss comes first. `rungs` has each candidate's rung for each seed. The first `keep` stay.
    Up to `more` others stay if their losses are within two standard errors of the last of these. `greater_is_better`
    is the metric's direction; a loss's is False.
    """
    losses = {name: statistics.fmean(rung.loss for rung in each) for name, each in rungs.items()}
    metrics = {name: mean_metric(each) for name, each in rungs.items()}
    sign = 0 if None in metrics.values() else -1 if greater_is_better else 1
    order = sorted(rungs, key=lambda name: (sign * (metrics[name] or 0.0), losses[name]))
    standings = []
    for place, name in enumerate(order):
        difference, error = compare(rungs[name], rungs[order[min(keep, len(order)) - 1]])
        stays = place < keep
        if not stays and more and difference <= _WITHIN * error:
            stays, more = True, more - 1
        standings.append(Standing(name, losses[name], metrics[name], difference, error, stays))
    return standings


def mean_metric(rungs: Sequence[Rung]) -> float | None:
    """Return the mean of a candidate's metric over its seeds; None if the loss is compared."""
    known = [rung.metric for rung in rungs if rung.metric is not None]
    return statistics.fmean(known) if len(known) == len(rungs) else None


def compare(one: Sequence[Rung], other: Sequence[Rung]) -> tuple[float, float]:
    """Return the difference of two candidates' losses, and its standard error.

    Both have a rung for each seed, in the same order and with the same rows. The error has two parts: the spread over
    rows of the paired differences and, with several seeds, their spread over seeds.
    """
    if one is other:
        return 0.0, 0.0
    differences = [rung.loss - paired.loss for rung, paired in zip(one, other, strict=True)]
    by_row = zip(*(_by_row(rung, paired) for rung, paired in zip(one, other, strict=True)), strict=True)
    parts = [statistics.fmean(each) for each in by_row]
    rows, seeds = len(parts), len(differences)
    of_rows = math.sqrt(rows / (rows - 1) * sum(part**2 for part in parts)) if rows > 1 else math.inf
    of_seeds = statistics.stdev(differences) / math.sqrt(seeds) if seeds > 1 else 0.0
    return statistics.fmean(differences), math.hypot(of_rows, of_seeds)


def _by_row(one: Rung, other: Rung) -> list[float]:
    """Return each row's part of the difference, less the row's share of the mean difference."""
    # A row counts as often as it has tokens, like in the loss over all tokens. With equal weights, the sum of squares
    # is that of the usual paired differences.
    return [a - b for a, b in zip(_parts(one), _parts(other), strict=True)]


def _parts(rung: Rung) -> list[float]:
    mean, total = rung.loss, sum(rung.weights)
    return [weight * (loss - mean) / total for loss, weight in zip(rung.losses, rung.weights, strict=True)]


def _keeps(candidates: int) -> tuple[int, int, int]:
    """Return how many candidates stay at each rung: a third but at least 3, then 2, then 1."""
    return max(3, candidates // 3), 2, 1
