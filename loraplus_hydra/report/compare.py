"""Comparison of a sweep's settings with each other and with ratio 1."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loraplus_hydra.report.limits import robust_limits
from loraplus_hydra.report.read_job import Job, Point
from loraplus_hydra.report.settings import Setting

ONE_SEED, NOISE, UNCLEAR, CLEAR = "one seed", "noise", "unclear", "clear"
_NEAR = 0.05  # share of the sweep's range within which settings with one seed are about as good
_MOST_REACHED = 8  # maximum number of settings whose speed is compared with the baseline
_DECIDES_RATIO = ("loraplus.ratio", "loraplus.lr_B", "loraplus")


@dataclass(frozen=True)
class Difference:
    """Gain of `better` over `worse`, compared with the spread over seeds."""

    better: Setting
    worse: Setting
    gain: float  # difference of the means; positive if `better` is better
    relative: float | None  # gain relative to the worse mean; None unless both means are above zero
    spread: float | None  # the larger of the two standard deviations over seeds
    interval: tuple[float, float] | None  # 95% confidence interval of the gain (Welch)
    wins: int  # number of shared seeds for which `better` is better
    shared: int  # number of seeds that both settings have
    verdict: str  # one seed | noise | unclear | clear


@dataclass(frozen=True)
class Reach:
    """First evaluation at which a setting is as good as ratio 1 at the end."""

    setting: Setting
    step: int | None = None  # None if there is no such evaluation
    seconds: float | None = None
    times_fewer_steps: float | None = None  # the steps of ratio 1 divided by `step`
    times_faster: float | None = None  # the same quotient for seconds


@dataclass(frozen=True)
class Tolerance:
    """Largest difference to the best mean at which a setting is about as good."""

    size: float
    by_seeds: bool  # True: the median standard deviation over seeds; False: 5% of the sweep's range

    def holds(self, value: float, best: float) -> bool:
        """Return True if `value` is about as good as the best."""
        return abs(value - best) <= self.size


@dataclass(frozen=True)
class Outcome:
    """Comparison of a sweep's settings."""

    ranked: tuple[Setting, ...]  # settings with a mean; the best comes first
    best: Setting | None
    best_job: Job | None  # the best setting's best seed
    baseline: Setting | None  # the best setting at ratio 1
    contender: Setting | None  # the best setting at another ratio
    against_baseline: Difference | None  # the better of baseline and contender, compared with the other
    # The contender compared with its own settings at ratio 1, unless these are the baseline
    against_twin: Difference | None
    passed_over: Setting | None  # a setting with a better mean than `best`, but with failed jobs or fewer seeds
    tolerance: Tolerance | None  # None for fewer than two settings with a mean
    near: tuple[Setting, ...]  # other settings that are about as good as the best
    target: float | None  # the last value of the baseline's mean curve
    reached: tuple[Reach, ...]  # first for the baseline, then for the best settings


def compare(settings: Sequence[Setting], *, greater_is_better: bool, chosen: str = "") -> Outcome:
    """Rank the settings. Compare the best at ratio 1 with the best at other ratios.

    Settings are ranked by their mean over seeds. A setting with a failed job can only be the best if every setting has
    a failed job. Of the others, only one with the most seeds can be the best. If a search has chosen a job, in the
    folder `chosen`, this job and its setting are the best.
    """
    sign = -1 if greater_is_better else 1
    ranked = sorted((one for one in settings if one.mean is not None), key=lambda one: sign * _mean(one))
    sound = [one for one in ranked if not one.failed] or ranked  # the seeds without failure may be the lucky ones
    most = max((len(one.measured) for one in sound), default=0)
    # So may the seeds of a setting with fewer of them
    sound = list(itertools.dropwhile(lambda one: len(one.measured) < most, sound))
    best, best_job = _best(ranked if chosen else sound, chosen, sign)
    baseline = next((one for one in sound if one.ratio == 1), None)
    contender = next((one for one in sound if one.ratio not in (1, None)), None)
    pair = [one for one in sound if one is baseline or one is contender]  # the better setting comes first
    twin = next((one for one in sound if one.ratio == 1 and contender and _alike(one, contender)), None)
    target, reached = speed(baseline, sound, sign) if baseline else (None, ())
    tolerance = tolerance_of(ranked) if len(ranked) > 1 else None
    others = [one for one in ranked if one is not best]
    near = [one for one in others if best and tolerance and tolerance.holds(_mean(one), _mean(best))]
    return Outcome(
        ranked=tuple(ranked),
        best=best,
        best_job=best_job,
        baseline=baseline,
        contender=contender,
        against_baseline=difference(pair[0], pair[1], sign) if len(pair) == 2 else None,
        against_twin=difference(contender, twin, sign) if contender and twin and twin is not baseline else None,
        passed_over=ranked[0] if ranked and ranked[0] is not best and not chosen else None,
        tolerance=tolerance,
        near=tuple(near),
        target=target,
        reached=reached,
    )


def _best(ranked: Sequence[Setting], chosen: str, sign: int) -> tuple[Setting | None, Job | None]:
    """Return the best setting and its best job; the chosen ones of a search, if they have a result."""
    if chosen:
        return next(((one, job) for one in ranked for job in one.done if job.folder == chosen), (None, None))
    if not ranked:
        return None, None
    return ranked[0], min(ranked[0].done, key=lambda job: sign * (job.value or 0.0))


def tolerance_of(settings: Sequence[Setting]) -> Tolerance:
    """Return the difference that is too small to tell settings with a mean apart.

    It is the noise between seeds, if it is known. A share of the metric itself would be all of the sweep's range, if
    the range is small. Values far outside don't count for the range.
    """
    spreads = [one.spread for one in settings if one.spread is not None]
    if spreads:
        return Tolerance(statistics.median(spreads), by_seeds=True)
    low, high, _ = robust_limits([_mean(one) for one in settings])
    return Tolerance(_NEAR * (high - low), by_seeds=False)


def difference(better: Setting, worse: Setting, sign: int) -> Difference:
    """Compare two settings' means with the spread over seeds.

    `sign` is -1 if a greater metric is better, otherwise 1.
    The verdict is `one seed` if a setting has fewer than two seeds. It is `noise` if the difference is at most the
    larger spread, `unclear` if the 95% interval of the difference (Welch's, for unequal variances) contains zero, and
    `clear` otherwise.
    """
    high, low = (better, worse) if sign == -1 else (worse, better)
    gain = _mean(high) - _mean(low)
    spread = None if better.spread is None or worse.spread is None else max(better.spread, worse.spread)
    interval = None if spread is None else welch(high.measured, low.measured)
    highs, lows = ({job.seed: job.value or 0.0 for job in one.done} for one in (high, low))
    shared = highs.keys() & lows.keys()
    return Difference(
        better=better,
        worse=worse,
        gain=gain,
        # For a logarithm, a relative gain has no meaning
        relative=gain / _mean(worse) if min(_mean(better), _mean(worse)) > 0 else None,
        spread=spread,
        interval=interval,
        wins=sum(highs[seed] > lows[seed] for seed in shared),
        shared=len(shared),
        verdict=_verdict(gain, spread, interval),
    )


def _verdict(gain: float, spread: float | None, interval: tuple[float, float] | None) -> str:
    if spread is None or interval is None:
        return ONE_SEED
    if abs(gain) <= spread:
        return NOISE
    return UNCLEAR if interval[0] <= 0 <= interval[1] else CLEAR


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of mean(first) - mean(second) by Welch's method.

    Each sample has at least two values. The variances may be unequal.
    """
    parts = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    gap = statistics.fmean(first) - statistics.fmean(second)
    if not sum(parts):
        return gap, gap
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(sample) - 1) for part, sample in zip(parts, (first, second), strict=True)
    )
    from scipy.special import stdtrit  # takes a tenth of a report's time, and only settings with several seeds need it

    half = float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts))
    return gap - half, gap + half


def mean_curve(curves: Iterable[Sequence[Point]]) -> tuple[Point, ...]:
    """Return the mean of the curves at the steps that all of them have."""
    by_step = [{point.step: point for point in curve} for curve in curves]
    if not by_step:
        return ()
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        here = [curve[step] for curve in by_step]
        clocks = [point.seconds for point in here if point.seconds is not None]
        seconds = statistics.fmean(clocks) if len(clocks) == len(here) else None
        points.append(Point(step, statistics.fmean(point.value for point in here), seconds))
    return tuple(points)


def first_reaching(curve: Iterable[Point], target: float, sign: int) -> Point | None:
    """Return the first evaluation after the start that is as good as `target`, or None."""
    return next((point for point in curve if point.step > 0 and sign * (point.value - target) <= 0), None)


def speed(baseline: Setting, settings: Iterable[Setting], sign: int) -> tuple[float | None, tuple[Reach, ...]]:
    """Return the baseline's final metric, and the evaluations at which settings first reach it.

    Curves are means over seeds. For the baseline, too, the first evaluation that is as good as the last is used.
    """
    curve = _evaluations(baseline)
    if len(curve) < 2:
        return None, ()
    target = curve[-1].value
    own = first_reaching(curve, target, sign)
    assert own is not None, "a curve always reaches its own last value"
    others = [one for one in settings if one is not baseline][:_MOST_REACHED]
    reached = ((one, first_reaching(_evaluations(one), target, sign)) for one in (baseline, *others))
    return target, tuple(_reach(one, point, own) for one, point in reached)


def _reach(setting: Setting, point: Point | None, own: Point) -> Reach:
    if point is None:
        return Reach(setting)
    faster = own.seconds / point.seconds if own.seconds and point.seconds else None
    return Reach(setting, point.step, point.seconds, own.step / point.step, faster)


def _evaluations(setting: Setting) -> tuple[Point, ...]:
    return mean_curve(job.evaluations for job in setting.done)


def _mean(setting: Setting) -> float:
    assert setting.mean is not None
    return setting.mean


def _alike(one: Setting, other: Setting) -> bool:
    """Return True if two settings differ only in keys that decide the ratio."""
    keys = [key for key in {**one.values, **other.values} if key not in _DECIDES_RATIO]
    return all(one.values.get(key) == other.values.get(key) for key in keys)
