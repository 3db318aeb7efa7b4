"""The keys that a sweep varies, and the jobs grouped by the values of these keys."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplus_hydra.config.identity import ALLOW, FORGETTING, ROWS
from loraplus_hydra.io import checkpoints
from loraplus_hydra.io.result import FAILED, OK
from loraplus_hydra.report.read_job import Job, Rates
from loraplus_hydra.report.read_sweep import Sweep
from loraplus_hydra.report.values import identity, number, whole_number

SEED = "seed"
# If several keys vary together, the first of these keys is shown.
_PREFERRED = (SEED, "loraplus.ratio", "loraplus.lr_A", "loraplus.lr_B", "optimizer.lr")
# Beginnings of keys that don't influence the trained weights.
_NOT_TRAINED = (
    checkpoints.KEY,
    ALLOW,
    FORGETTING,
    "trainer.logging_",
    "trainer.save_",
    "trainer.dataloader_num_workers",
    "trainer.per_device_eval_batch_size",
    "task.sample",
    "logger",
    "launcher",
    "hparams_search",  # if it sets keys of the run, these are compared
)
_ROWS = tuple(f"trainer.{name}" for name in ROWS)


@dataclass(frozen=True)
class Setting:
    """Jobs with the same values of all varied keys except the seed."""

    values: Mapping[str, Any]
    jobs: tuple[Job, ...]

    @property
    def done(self) -> tuple[Job, ...]:
        """Jobs with a result."""
        return tuple(job for job in self.jobs if job.has_result)

    @property
    def measured(self) -> tuple[float, ...]:
        """The metric of each seed.

        Jobs with the same seed differ in nothing that trains, so they count once, with their mean.
        """
        by_seed: dict[int | str, list[float]] = {}
        for job in self.done:
            if job.value is not None:
                by_seed.setdefault(job.folder if job.seed is None else job.seed, []).append(job.value)
        return tuple(map(statistics.fmean, by_seed.values()))

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.measured) if self.measured else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (with n - 1); None for fewer than two seeds."""
        return statistics.stdev(self.measured) if len(self.measured) > 1 else None

    @property
    def failed(self) -> int:
        """The number of jobs that failed, or ended without a number for the metric of the others."""
        metrics = {job.metric for job in self.done}
        return sum(
            job.status == FAILED or (job.status == OK and job.value is None and job.metric in metrics)
            for job in self.jobs
        )

    @property
    def left_at(self) -> int | None:
        """The step at which the setting left a search; None if a job of it didn't leave."""
        steps = [job.left_at for job in self.jobs]
        return None if None in steps else max((step for step in steps if step is not None), default=None)

    def at_rung(self, step: int, *, by_loss: bool) -> float | None:
        """Return the mean loss or metric of the jobs at a rung; None if one is unknown."""
        rungs = [next((one for one in job.rungs if one.step == step and any(one.weights)), None) for job in self.jobs]
        values = [None if one is None else number(one.loss if by_loss else one.metric) for one in rungs]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    @property
    def rates(self) -> Rates | None:
        return next((job.rates for job in self.jobs if job.rates), None)

    @property
    def ratio(self) -> float | None:
        """eta_B / eta_A, rounded because ratios can differ by rounding errors."""
        return None if self.rates is None else float(f"{self.rates.ratio:.4g}")


def varied_keys(sweep: Sweep) -> tuple[str, ...]:
    """Return the keys in which the jobs differ. The seed is last.

    Keys in overrides or sweep.json come first. A key is omitted if these keys decide its value, for example an
    interpolation or a value from a group's option. If other keys vary together, one of them is returned. A key that
    doesn't influence the trained weights is returned only if it is in sweep.json.
    """
    overridden = [key for job in sweep.jobs for key in job.given]
    candidates = dict.fromkeys([*sweep.swept, *(key for key in overridden if not key.startswith(_NOT_TRAINED))])
    named = [key for key in candidates if _differs(sweep.jobs, key)]
    keys = [*named, *_unexplained_keys([job for job in sweep.jobs if job.whole_config], named)]
    return tuple(sorted(keys, key=lambda key: key == SEED))


def _unexplained_keys(jobs: Sequence[Job], named: Sequence[str]) -> list[str]:
    """Return keys whose differences between jobs are not explained by the `named` keys."""
    found = dict.fromkeys(key for job in jobs for key in job.config)
    leaves = [key for key in found if not key.startswith(_NOT_TRAINED)]
    leaves.sort(key=lambda key: (_PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED), key.count(".")))
    explained = [tuple(identity(value_of(job, key)) for key in named) for job in jobs]
    patterns: dict[tuple[int, ...], str] = {}
    for key in leaves:
        column = [identity(value_of(job, key)) for job in jobs]
        if key not in named and len(set(column)) > 1 and not _follows(column, explained):
            patterns.setdefault(_pattern(column), key)
    return list(patterns.values())


def value_of(job: Job, key: str) -> Any:
    """Return the job's value of `key`, from the config or else from an override."""
    if key == SEED:
        return job.seed
    if key in _ROWS and job.config.get("trainer.auto_batch") is True:
        # The memory has decided how the rows of a step are divided. Their number is that of the config
        per_batch, batches = (whole_number(job.config.get(one)) or 1 for one in _ROWS)
        return per_batch * batches if key == _ROWS[0] else 1
    return job.config[key] if key in job.config else job.given.get(key)


def settings_of(sweep: Sweep, keys: Sequence[str]) -> tuple[Setting, ...]:
    """Group the jobs by the values of all `keys` except the seed."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    compared = [key for key in keys if key != SEED]
    for job in sweep.jobs:
        if job.config or job.overrides:  # otherwise the job's values are unknown
            groups.setdefault(tuple(identity(value_of(job, key)) for key in compared), []).append(job)
    return tuple(Setting({key: value_of(jobs[0], key) for key in compared}, tuple(jobs)) for jobs in groups.values())


def order(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values in the order of an axis: numbers by size, then texts."""
    distinct = {identity(value): value for value in values}.values()
    return sorted(distinct, key=lambda value: (1, 0, str(value)) if number(value) is None else (0, value, ""))


def _differs(jobs: Iterable[Job], key: str) -> bool:
    return len({identity(value_of(job, key)) for job in jobs if job.config or job.overrides}) > 1


def _follows(column: Sequence[str], explained: Sequence[tuple[str, ...]]) -> bool:
    """Return True if `column` is a function of the named keys' values."""
    seen: dict[tuple[str, ...], str] = {}
    return all(seen.setdefault(key, value) == value for key, value in zip(explained, column, strict=True))


def _pattern(column: Sequence[str]) -> tuple[int, ...]:
    """Return the equality pattern of a column. Two keys with the same pattern vary together."""
    first: dict[str, int] = {}
    return tuple(first.setdefault(value, place) for place, value in enumerate(column))
