"""The search of `tune`: its candidates, its planned cost, and the decision between the two finalists.

A candidate is a pair of eta_B and ratio, because the best eta_B hardly depends on the ratio. Steps are counted in units
of one run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loraplus_hydra.io.rungs import FEWEST_STEPS
from loraplus_hydra.report.formatting import short
from loraplus_hydra.sweep.halving import Stop

LR, RATIO, LR_A, LR_B = "optimizer.lr", "loraplus.ratio", "loraplus.lr_A", "loraplus.lr_B"
SEED = "seed"
FIRST, SECOND, HALF = 1 / 16, 1 / 4, 1 / 2  # rungs, as shares of all steps
FINALISTS = 2
FEWEST_SEEDS = 2  # with a spread
_FACTOR = 3.0  # between neighbouring values of eta_B
_RATES = (9, 7, 5, 3)  # number of values of eta_B; an odd one has the centre in the middle


@dataclass(frozen=True)
class Candidate:
    """A pair of eta_B and ratio."""

    eta_B: float  # noqa: N815
    ratio: float

    @property
    def eta_A(self) -> float:
        return float(f"{self.eta_B / self.ratio:.6g}")


@dataclass(frozen=True)
class Settings:
    """The settings of a search."""

    keys: tuple[str, ...]  # the keys of the run that decide eta_A and eta_B
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]  # of the finalists; the first one is also of the search
    budget: float  # in units of one run's steps
    metric: str
    greater_is_better: bool
    preset: str  # the option of `loraplus`
    steps: int | None = None  # of a run; None if its rows decide

    @property
    def swept(self) -> tuple[str, ...]:
        """The keys in which the jobs differ."""
        return (*self.keys, SEED)

    @property
    def planned(self) -> float:
        """The planned cost, in the unit of the budget."""
        return self.cost_of(len(self.candidates))

    def cost_of(self, candidates: int) -> float:
        """Return the planned cost of a search with another number of candidates."""
        return cost(candidates, len(self.seeds), self.steps)

    def summary(self) -> str:
        """Return a sentence about the candidates and the planned cost."""
        rates, ratios = ({getattr(one, name) for one in self.candidates} for name in ("eta_B", "ratio"))
        grid = f"eta_B {', '.join(map(short, sorted(rates)))}; ratio {', '.join(map(short, sorted(ratios)))}"
        planned = f"planned are the steps of {self.planned:.1f} runs, of a budget of {self.budget:g}"
        return f"Tuning: {len(self.candidates)} candidates ({grid}); {planned}"

    def overrides(self, candidate: Candidate) -> tuple[str, ...]:
        """Return the overrides that set a candidate's rates."""
        values = {LR: candidate.eta_A, RATIO: candidate.ratio, LR_A: candidate.eta_A, LR_B: candidate.eta_B}
        return tuple(f"{key}={values[key]:.6g}" for key in self.keys)


@dataclass(frozen=True)
class Verdict:
    """The paired difference of the two finalists over the seeds. Above 0, the first one is better."""

    difference: float  # mean over the seeds
    error: float  # standard error of the difference
    quantile: float  # number of standard errors of a clear difference: 95% of Student's t
    spread: float  # the larger standard deviation of one finalist over the seeds

    @property
    def is_clear(self) -> bool:
        return abs(self.difference) > max(self.quantile * self.error, self.spread)


def candidates(eta_B: Sequence[float], ratios: Sequence[float]) -> list[Candidate]:
    """Return all pairs, each once, with six digits as in their overrides."""
    rates, multiples = ({float(f"{value:.6g}") for value in values} for values in (eta_B, ratios))
    return [Candidate(rate, ratio) for rate in sorted(rates) for ratio in sorted(multiples)]


def rates_around(centre: float, number: int) -> list[float]:
    """Return `number` values of eta_B around `centre`, a factor of 3 apart, with two digits."""
    return [float(f"{centre * _FACTOR ** (place - number // 2):.2g}") for place in range(number)]


def number_of_rates(budget: float, ratios: int, seeds: int, steps: int | None) -> int:
    """Return the largest number of values of eta_B that the budget allows; 3 if it allows none."""
    return next((number for number in _RATES if cost(number * ratios, seeds, steps) <= budget), _RATES[-1])


def cost(candidates: int, seeds: int, steps: int | None, earliest: int = FEWEST_STEPS) -> float:
    """Return the planned steps of a search, in units of one run.

    All candidates train to the first rung, a third of them (at least 3) to the second, and two to half of the steps.
    There, these two have `seeds` seeds. One of them trains to its end. `steps` are those of a run, and no rung is
    before the step `earliest`. With None, all rungs are at their shares of the steps.
    """
    first, second, half = (
        share if steps is None else rung_step(share, steps, earliest) / steps for share in (FIRST, SECOND, HALF)
    )
    of_search = candidates * first + min(candidates, kept_first(candidates)) * (second - first)
    return of_search + FINALISTS * (half - second) + FINALISTS * (seeds - 1) * half + (1 - half)


def kept_first(candidates: int) -> int:
    """Return the number of candidates that stay at the first rung."""
    return max(3, candidates // 3)


def stops(candidates: int, steps: int, earliest: int) -> tuple[Stop, ...]:
    """Return the rungs before the finalists are compared.

    No rung is before the step `earliest` or after the last step. Of rungs at the same step, the last one counts. All
    searches have both rungs, also those with two candidates. So a search with more candidates in the same folder finds
    them.
    """
    planned = {}
    for share, keep in ((FIRST, kept_first(candidates)), (SECOND, FINALISTS)):
        step = rung_step(share, steps, earliest)
        planned[step] = Stop(step, keep)
    return tuple(planned.values())


def rung_step(share: float, steps: int, earliest: int) -> int:
    """Return the step of the rung at a share of all steps."""
    return min(max(round(share * steps), earliest), steps)


def verdict(first: Sequence[float], second: Sequence[float], *, greater_is_better: bool) -> Verdict:
    """Compare two candidates by their metrics, with a value for each seed, in the same order.

    The seeds are shared, so each difference is of a pair. This removes the seeds' common part from the noise.
    """
    from scipy.special import stdtrit  # slow to import, and most commands compare nothing

    sign = 1 if greater_is_better else -1
    differences = [sign * (one - other) for one, other in zip(first, second, strict=True)]
    number = len(differences)
    return Verdict(
        difference=statistics.fmean(differences),
        error=statistics.stdev(differences) / math.sqrt(number),
        quantile=float(stdtrit(number - 1, 0.975)),
        spread=max(statistics.stdev(first), statistics.stdev(second)),
    )
