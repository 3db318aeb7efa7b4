"""What a sweep says: the best setting, the best at ratio 1, whether the seeds' noise explains the difference, speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraplus_hydra.report.read_sweep import Job, Point
from loraplus_hydra.report.settings import Setting

ONE_SEED, NOISE, UNCLEAR, CLEAR = "one seed", "noise", "unclear", "clear"
NEAR = 0.01  # within 1% of the best
_DECIDES_RATIO = ("loraplus.ratio", "loraplus.lr_B", "loraplus")


@dataclass(frozen=True)
class Difference:
    """By how much `better` beats `worse`, and what the seeds' spread says of it."""

    better: Setting
    worse: Setting
    gain: float  # of the means, positive when `better` is better
    relative: float | None  # of the worse one's mean; None where that isn't above zero, as a logarithm isn't
    spread: float | None  # the larger of the two standard deviations over seeds
    interval: tuple[float, float] | None  # 95% confidence interval of the gain (Welch)
    wins: int  # seeds that both have, at which `better` is better
    shared: int
    verdict: str  # one seed | noise | unclear | clear


@dataclass(frozen=True)
class Reach:
    """When a setting's mean curve reaches the loss that ratio 1 ends with."""

    setting: Setting
    step: int | None  # None: it doesn't
    seconds: float | None
    times_fewer_steps: float | None  # ratio 1's steps over its own
    times_faster: float | None  # the same of seconds


@dataclass(frozen=True)
class Outcome:
    """What a sweep says."""

    ranked: tuple[Setting, ...]  # settings with a mean, the best first
    best: Setting | None
    best_job: Job | None  # the best setting's best seed
    baseline: Setting | None  # the best setting at ratio 1
    contender: Setting | None  # the best setting at another ratio
    against_baseline: Difference | None  # the better of baseline and contender against the other
    against_twin: Difference | None  # contender against ratio 1 with all else the same, where that isn't the baseline
    passed_over: Setting | None  # a better mean of a setting some of whose jobs failed
    near: tuple[Setting, ...]  # within 1% of the best, without it
    target: float | None  # what the baseline's mean curve ends with
    reached: tuple[Reach, ...]  # the baseline's own first, then the best settings


def compare(settings: Sequence[Setting], *, greater_is_better: bool) -> Outcome:
    """Rank the settings by their mean over seeds and compare the best with the best at ratio 1.

    A setting one of whose jobs failed can't be the best unless every setting has such a job: the seeds that got through
    would be a favourable choice.
    """
    sign = -1 if greater_is_better else 1
    ranked = sorted((one for one in settings if one.mean is not None), key=lambda one: sign * _mean(one))
    sound = [one for one in ranked if not one.failed] or ranked
    best = sound[0] if sound else None
    baseline = next((one for one in sound if one.ratio == 1), None)
    contender = next((one for one in sound if one.ratio not in (1, None)), None)
    against_baseline = against_twin = None
    if best and baseline and contender:
        first, second = (
            (contender, baseline) if sign * (_mean(contender) - _mean(baseline)) < 0 else (baseline, contender)
        )
        against_baseline = difference(first, second, greater_is_better=greater_is_better)
        twin = next((one for one in sound if one.ratio == 1 and _alike(one, contender)), None)
        if twin is not None and twin is not baseline:
            against_twin = difference(contender, twin, greater_is_better=greater_is_better)
    target, reached = speed(baseline, sound, greater_is_better=greater_is_better) if baseline else (None, ())
    return Outcome(
        ranked=tuple(ranked),
        best=best,
        best_job=min(best.done, key=lambda job: sign * (job.value or 0.0)) if best else None,
        baseline=baseline,
        contender=contender,
        against_baseline=against_baseline,
        against_twin=against_twin,
        passed_over=ranked[0] if ranked and ranked[0] is not best else None,
        near=tuple(one for one in ranked if best and one is not best and is_near(_mean(one), _mean(best))),
        target=target,
        reached=reached,
    )


def is_near(value: float, best: float) -> bool:
    """Within 1% of the best."""
    return abs(value - best) <= NEAR * abs(best)


def difference(better: Setting, worse: Setting, *, greater_is_better: bool) -> Difference:
    """The means' difference beside the spread over seeds.

    The verdict: `one seed` where either has fewer than two; `noise` where the difference is no larger than the larger
    spread; `unclear` where its 95% interval (Welch's, for unequal variances) takes in zero; `clear` otherwise.
    """
    sign = 1 if greater_is_better else -1
    gain = sign * (_mean(better) - _mean(worse))
    spreads = [one.spread for one in (better, worse) if one.spread is not None]
    mine, theirs = ({job.seed: job.value or 0.0 for job in one.done} for one in (better, worse))
    shared = mine.keys() & theirs.keys()
    interval = welch(better.measured, worse.measured) if len(spreads) == 2 else None
    if interval is not None and sign < 0:
        interval = (-interval[1], -interval[0])
    if len(spreads) < 2 or interval is None:
        verdict = ONE_SEED
    elif abs(gain) <= max(spreads):
        verdict = NOISE
    else:
        verdict = UNCLEAR if interval[0] <= 0 <= interval[1] else CLEAR
    return Difference(
        better=better,
        worse=worse,
        gain=gain,
        relative=gain / _mean(worse) if min(_mean(better), _mean(worse)) > 0 else None,
        spread=max(spreads) if len(spreads) == 2 else None,
        interval=interval,
        wins=sum(sign * (mine[seed] - theirs[seed]) > 0 for seed in shared),
        shared=len(shared),
        verdict=verdict,
    )


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of mean(first) - mean(second) for two samples of unequal variances, two or more each."""
    from scipy.special import stdtrit

    parts = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    gap = statistics.fmean(first) - statistics.fmean(second)
    if not sum(parts):
        return gap, gap
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(sample) - 1) for part, sample in zip(parts, (first, second), strict=True)
    )
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts))
    return gap - half, gap + half


def mean_curve(jobs: Iterable[Job]) -> tuple[Point, ...]:
    """The mean of the jobs' evaluations at the steps that all of them have."""
    curves = [{point.step: point for point in job.evaluations} for job in jobs]
    if not curves:
        return ()
    points = []
    for step in sorted(set.intersection(*(set(curve) for curve in curves))):
        here = [curve[step] for curve in curves]
        clocks = [point.seconds for point in here if point.seconds is not None]
        seconds = statistics.fmean(clocks) if len(clocks) == len(here) else None
        points.append(Point(step, statistics.fmean(point.value for point in here), seconds))
    return tuple(points)


def first_reaching(curve: Iterable[Point], target: float, *, greater_is_better: bool) -> Point | None:
    """The first evaluation after the start that is as good as `target`, or None: nothing between two is assumed."""
    sign = -1 if greater_is_better else 1
    return next((point for point in curve if point.step > 0 and sign * (point.value - target) <= 0), None)


def speed(
    baseline: Setting, settings: Iterable[Setting], *, greater_is_better: bool, at_most: int = 8
) -> tuple[float | None, tuple[Reach, ...]]:
    """What the baseline's mean curve ends with, and when it and the best other settings first get there.

    The baseline is measured like the others: by the first evaluation that is as good as its last.
    """
    curve = mean_curve(baseline.done)
    if len(curve) < 2:
        return None, ()
    target = curve[-1].value
    own = first_reaching(curve, target, greater_is_better=greater_is_better)
    assert own is not None, "a curve reaches its own end"
    reached = [Reach(baseline, own.step, own.seconds, 1.0, 1.0 if own.seconds else None)]
    for setting in [one for one in settings if one is not baseline][:at_most]:
        point = first_reaching(mean_curve(setting.done), target, greater_is_better=greater_is_better)
        if point is None:
            reached.append(Reach(setting, None, None, None, None))
            continue
        faster = own.seconds / point.seconds if own.seconds and point.seconds else None
        reached.append(Reach(setting, point.step, point.seconds, own.step / point.step, faster))
    return target, tuple(reached)


def _mean(setting: Setting) -> float:
    assert setting.mean is not None
    return setting.mean


def _alike(one: Setting, other: Setting) -> bool:
    """Whether two settings differ in nothing but what decides the ratio."""
    keys = [key for key in {**one.values, **other.values} if key not in _DECIDES_RATIO]
    return all(one.values.get(key) == other.values.get(key) for key in keys)
