"""Which keys a sweep varies, and its settings: the jobs that differ in nothing but the seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplus_hydra.io.result import FAILED
from loraplus_hydra.report.overrides import GOES_ON_FROM, override_values
from loraplus_hydra.report.read_sweep import Job, Rates, Sweep
from loraplus_hydra.report.values import number

SEED = "seed"
# What a reader looks for first, of keys that differ alike.
_PREFERRED = (SEED, "loraplus.ratio", "loraplus.lr_A", "loraplus.lr_B", "optimizer.lr")
# Beginnings of keys that change nothing of what is trained: where a run went on from, what it writes, shows and tells.
_NOT_TRAINED = (
    GOES_ON_FROM,
    "trainer.logging_",
    "trainer.save_",
    "trainer.dataloader_num_workers",
    "trainer.per_device_eval_batch_size",
    "task.sample",
    "logger",
)


@dataclass(frozen=True)
class Setting:
    """The jobs that share their values of all varied keys but the seed."""

    values: Mapping[str, Any]
    jobs: tuple[Job, ...]

    @property
    def done(self) -> tuple[Job, ...]:
        """Those that count in a comparison."""
        return tuple(job for job in self.jobs if job.counts)

    @property
    def measured(self) -> tuple[float, ...]:
        return tuple(job.value for job in self.jobs if job.counts and job.value is not None)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.measured) if self.measured else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1 in its denominator); None for fewer than two."""
        return statistics.stdev(self.measured) if len(self.measured) > 1 else None

    @property
    def failed(self) -> int:
        return sum(job.status == FAILED for job in self.jobs)

    @property
    def rates(self) -> Rates | None:
        return next((job.rates for job in self.jobs if job.rates), None)

    @property
    def ratio(self) -> float | None:
        """eta_B / eta_A, rounded so that equal ratios are equal."""
        return None if self.rates is None else float(f"{self.rates.ratio:.4g}")


def varied_keys(sweep: Sweep) -> tuple[str, ...]:
    """The keys in which the jobs differ, the seed last.

    Where overrides or sweep.json say what was swept, a key that merely follows those is left out: an interpolation, or
    what comes with a group's option. Of other keys that differ alike, one stands for all. What changes nothing of what
    is trained counts where sweep.json names it alone.
    """
    given = [key for job in sweep.jobs for key in override_values(job.overrides)]
    told = list(dict.fromkeys([*sweep.swept, *(key for key in given if not key.startswith(_NOT_TRAINED))]))
    swept = [key for key in told if _differs(_known(sweep.jobs, key))]
    witnesses = [job for job in sweep.jobs if job.whole_config]
    found = dict.fromkeys(key for job in witnesses for key in job.config)
    leaves = [key for key in found if not key.startswith(_NOT_TRAINED)]
    leaves.sort(key=lambda key: (_PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED), key.count(".")))
    unexplained = []
    explained = [tuple(str(value_of(job, key)) for key in swept) for job in witnesses]
    alike = set()
    for key in leaves:
        column = [str(job.config.get(key)) for job in witnesses]
        if key in swept or len(set(column)) < 2 or _follows(column, explained):
            continue
        if (shape := _shape(column)) not in alike:
            alike.add(shape)
            unexplained.append(key)
    keys = [*swept, *unexplained]
    return tuple(sorted(keys, key=lambda key: key == SEED))


def value_of(job: Job, key: str) -> Any:
    """The job's value of `key`: its config's, or else what its override says (a group's option, a whole mapping)."""
    if key == SEED:
        return job.seed
    return job.config[key] if key in job.config else override_values(job.overrides).get(key)


def settings_of(sweep: Sweep, keys: Sequence[str]) -> tuple[Setting, ...]:
    """The jobs grouped by all of `keys` but the seed; jobs of which no config is known stand in none."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    compared = [key for key in keys if key != SEED]
    for job in sweep.jobs:
        if job.config or job.overrides:
            groups.setdefault(tuple(repr(value_of(job, key)) for key in compared), []).append(job)
    return tuple(Setting({key: value_of(jobs[0], key) for key in compared}, tuple(jobs)) for jobs in groups.values())


def order(values: Iterable[Any]) -> list[Any]:
    """Distinct values in the order in which an axis shows them: numbers by size, then texts."""
    distinct = {repr(value): value for value in values}.values()
    return sorted(distinct, key=lambda value: (1, 0, str(value)) if number(value) is None else (0, value, ""))


def _known(jobs: Iterable[Job], key: str) -> list[str]:
    """Its values, as text; of a job without any config or override nothing is known."""
    return [str(value_of(job, key)) for job in jobs if job.config or job.overrides]


def _differs(column: Sequence[str]) -> bool:
    return len(set(column)) > 1


def _follows(column: Sequence[str], explained: Sequence[tuple[str, ...]]) -> bool:
    """Whether `column` is a function of the swept keys' values."""
    seen: dict[tuple[str, ...], str] = {}
    return all(seen.setdefault(key, value) == value for key, value in zip(explained, column, strict=True))


def _shape(column: Sequence[str]) -> tuple[int, ...]:
    """Which entries are equal to which: the same for two keys that differ alike."""
    first: dict[str, int] = {}
    return tuple(first.setdefault(value, place) for place, value in enumerate(column))
