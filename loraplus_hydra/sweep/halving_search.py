"""Successive halving of a grid: batches of jobs for Hydra's launcher, and decisions between them.

Every decision follows from the jobs' own rungs.json. So the same command, given again after the search was killed,
comes to the same decisions. halving.json is their record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from loraplus_hydra.errors import Problem, UserError, first_of, refuse
from loraplus_hydra.io import job_status, screen
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.job_status import JobStatus
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.result import FAILED, OK, PRUNED, read_result
from loraplus_hydra.io.run_folder import HALVING
from loraplus_hydra.io.rungs import Rung, read_rungs
from loraplus_hydra.sweep import halving
from loraplus_hydra.sweep.halving import Standing, Stop
from loraplus_hydra.sweep.plan import GRID, Sweep, grid_of, swept_overrides

SWEEPER = "hydra_plugins.loraplus_halving.HalvingSweeper"
_SEED = "seed"
_LENGTHS = ("trainer.max_steps", "trainer.num_train_epochs")
_MOST_SHOWN = 4
_OTHER_ROWS = "the jobs have different held-out rows, so they can't be compared: use halving=false"

Overrides = tuple[str, ...]  # of one job


def check_halving(config: DictConfig) -> None:
    """Raise ConfigErrors for a sweep that can't be halved.

    `config` is the whole config. The sweep has not begun, so nothing has been written.
    """
    refuse(_problems(config))


def use_halving(config: DictConfig, sweep: Sweep) -> None:
    """Give a grid the sweeper that halves it, if `halving` is set. `sweep` has begun."""
    if config.halving:
        with open_dict(config):
            grid: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
            config.hydra.sweeper = {**grid, "_target_": SWEEPER, "start": sweep.start.name}


def _problems(config: DictConfig) -> Iterator[Problem]:
    if not isinstance(config.halving, bool):
        yield Problem("halving", f"'{config.halving}' is not a switch", "use true or false")
        return
    if not config.halving:
        return
    swept = swept_overrides(config)
    target = str(config.hydra.sweeper.get("_target_"))
    if target != GRID:
        yield Problem(
            "halving", f"needs a grid, but the sweeper is {target.rpartition('.')[2]}", "use only one of them"
        )
    elif len({_without_seed(job) for job in grid_of(config, swept)}) < 2:
        yield Problem("halving", "there is nothing to compare", "give a key besides the seed several values: key=a,b")
    for key in _LENGTHS:
        if any(one.key_or_group == key for one in swept):
            yield Problem(key, "halving compares jobs with the same number of steps", "give it one value")
    yield from comparability_problems(config)


def comparability_problems(config: DictConfig) -> Iterator[Problem]:
    """Yield a Problem for each setting that keeps jobs from being compared at rungs."""
    if OmegaConf.select(config, "trainer.early_stopping_patience") is not None:
        yield Problem("trainer.early_stopping_patience", "halving compares jobs at the same steps", "set it to null")
    subdir = str(OmegaConf.to_container(config.hydra.sweep, resolve=False))
    if "hydra.job.num" in subdir or "hydra.job.id" in subdir:
        yield Problem("hydra.sweep.subdir", "a job gets a new number at each rung", "name the folder by other values")


def batches(
    jobs: Sequence[Sequence[str]], folder: Path, start: str, *, greater_is_better: bool
) -> Iterator[list[Overrides]]:
    """Yield the jobs that are launched together: those of each rung, then those that finish.

    `jobs` has the overrides of each job. `folder` and `start` are the sweep's. `greater_is_better` is the direction of
    `task.metric`. A batch must have ended before the next one is taken. Raises UserError if the jobs can't be compared.
    """
    search = Search(jobs, folder, start, greater_is_better=greater_is_better)
    candidates, seeds = len(search.candidates), max(map(len, search.candidates.values()))
    stops: tuple[Stop, ...] = ()
    share = halving.first_share(candidates)
    if share is not None:
        yield from search.batch(search.remaining, share)
        stops = search.plan(share, lambda steps, earliest: halving.plan(candidates, steps, earliest))
        if search.steps and not stops:
            screen.show(f"Halving: {search.steps} steps are too few for a rung, so every job runs to its end")
    for number, stop in enumerate(stops):
        if len(search.remaining) <= stop.keep:
            continue
        yield from search.batch_until(stop.step)
        search.arrive(stop.step)
        search.decide(stop, halving.places(candidates, stops, search.steps, number, search.spent / seeds))
        _write(search)
    yield from search.batch(search.remaining)
    if stops:
        search.arrive(search.steps)
        _write(search)


def _write(search: Search) -> None:
    seeds = max(map(len, search.candidates.values()))
    content = {
        "steps": search.steps,  # steps of one job
        "job_steps": search.spent,  # steps that all jobs have taken
        "of": len(search.candidates) * search.steps * seeds,  # steps of the whole grid without halving
        "rungs": search.rungs(),  # for each: its step, the number of settings to keep, and the candidates
    }
    write_text(search.folder / HALVING, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


class Search:
    """A search in progress: the remaining candidates, and the steps that were taken."""

    def __init__(self, jobs: Sequence[Sequence[str]], folder: Path, start: str, *, greater_is_better: bool) -> None:
        self.folder = folder
        self.start = start
        self.greater_is_better = greater_is_better
        self.candidates: dict[str, list[Overrides]] = {}  # name -> a job for each seed
        common = set.intersection(*map(set, jobs))
        for job in dict.fromkeys(map(tuple, jobs)):
            name = " ".join(text for text in _without_seed(job) if text not in common)
            self.candidates.setdefault(name, []).append(job)
        self.remaining = list(self.candidates)
        self.steps = 0  # of one job; 0 = unknown
        self.earliest = 0  # the first step at which jobs are compared
        self.decisions: list[tuple[Stop, list[Standing]]] = []
        self._taken: dict[Overrides, int] = {}  # the steps of each job

    @property
    def spent(self) -> int:
        """The steps that all jobs have taken, also those of jobs that have failed or left."""
        return sum(self._taken.values())

    def batch(self, names: Iterable[str], share: float | None = None) -> Iterator[list[Overrides]]:
        """Yield the batch of the candidates' jobs. With `share`, they stop at this rung."""
        yield from self._batch([job for name in names for job in self.candidates[name]], share)

    def batch_until(self, step: int) -> Iterator[list[Overrides]]:
        """Yield the batch of the remaining candidates' jobs that have not been at the rung of `step`."""
        statuses = self._statuses()
        jobs = [job for name in self.remaining for job in self.candidates[name]]
        yield from self._batch(
            [job for job in jobs if not _is_done(statuses[job]) and self._rung(statuses[job], step) is None],
            step / self.steps,
        )

    def _batch(self, jobs: Sequence[Overrides], share: float | None) -> Iterator[list[Overrides]]:
        stop = () if share is None else (f"sweep.stop_at={share!r}",)
        if jobs:  # some launchers refuse an empty batch
            yield [(*job, *stop) for job in jobs]

    def plan(self, share: float, planned: Callable[[int, int], tuple[Stop, ...]]) -> tuple[Stop, ...]:
        """Return the rungs that `planned` gives for the jobs' steps and the earliest step of a rung.

        Both are known once jobs have been at the first rung, `share`. The result is empty if no job has been there.
        """
        found = [rung for status in self._statuses().values() for rung in self._rungs(status) if rung.stop_at == share]
        if found:
            self._count(found[0].step)
        self._remove_failed(lambda rung: rung.stop_at == share)
        if not found:  # all jobs have failed, or had run to their ends before
            return ()
        self.steps = found[0].steps
        if other := next((rung.steps for rung in found if rung.steps != self.steps), None):
            raise UserError(f"the jobs have different numbers of steps ({self.steps} and {other}): use halving=false")
        self._refuse_other_rows(self.remaining)  # at the first rung, before most of the work
        self.earliest = max(rung.earliest for rung in found)
        return planned(self.steps, self.earliest)

    def arrive(self, step: int) -> None:
        """Count the steps that the remaining candidates have taken until the rung at `step`.

        The candidates that failed before are removed.
        """
        self._count(step)
        if step < self.steps:
            self._remove_failed(lambda rung: rung.step == step)

    def _count(self, step: int) -> None:
        """Count the remaining jobs' steps up to `step`. A job that has failed may have taken fewer."""
        statuses = self._statuses()
        for job in (job for name in self.remaining for job in self.candidates[name]):
            status, reached = statuses[job], step
            if not _is_done(status) and (_has_failed(status) or self._rung(status, step) is None):
                result = None if status is None else read_result(self.folder / status.folder)
                # A resumed job that failed before its first step has no steps in its result
                known = [rung.step for rung in self._rungs(status)] + ([] if result is None else [result.steps])
                reached = min(max(known, default=0), step)
            self._taken[job] = reached

    def decide(self, stop: Stop, more: int) -> None:
        """Decide which candidates stay at a rung. `more` is the number that may stay besides the planned ones."""
        known = self.at_rung(stop.step)
        standings = halving.decide(known, stop.keep, more, greater_is_better=self.greater_is_better) if known else []
        self.decisions.append((stop, standings))
        self.leave([one.name for one in standings if not one.stays])
        shown = [f"{one.name} ({one.loss if one.metric is None else one.metric:.4f})" for one in standings if one.stays]
        stay = f"{len(self.remaining)} of {len(self.candidates)} stay at step {stop.step}"
        screen.show(f"Halving: {stay}: {first_of(shown, _MOST_SHOWN)}")

    def rungs(self) -> list[dict[str, Any]]:
        """Return the decisions for JSON."""
        return [
            {"step": stop.step, "keep": stop.keep, "candidates": [asdict(one) for one in standings]}
            for stop, standings in self.decisions
        ]

    def at_rung(self, step: int) -> dict[str, list[Rung]]:
        """Return the rungs at `step` of each remaining candidate that has them for all its seeds.

        Raises UserError if the held-out rows differ.
        """
        statuses = self._statuses()
        rungs = {name: [self._rung(statuses[job], step) for job in self.candidates[name]] for name in self.remaining}
        # A job that the same sweep without halving has trained beyond the rung continues without a comparison
        known = {name: [rung for rung in each if rung is not None and rung.losses] for name, each in rungs.items()}
        known = {name: each for name, each in known.items() if len(each) == len(self.candidates[name])}
        if len({len(rung.losses) for each in known.values() for rung in each}) > 1:
            raise UserError(_OTHER_ROWS)
        self._refuse_other_rows(known)
        return known

    def _refuse_other_rows(self, names: Iterable[str]) -> None:
        """Raise UserError if the candidates' jobs with the same seed have different held-out rows.

        Another seed may have other rows. Rows without a fingerprint are not compared.
        """
        statuses = self._statuses()
        for jobs in zip(*(self.candidates[name] for name in names), strict=False):
            if len({rows for job in jobs if (rows := self._rows(statuses[job]))}) > 1:
                raise UserError(_OTHER_ROWS)

    def _remove_failed(self, is_the_rung: Callable[[Rung], bool]) -> None:
        """Remove the candidates with a failed job, or with one that ended before it was at the rung."""
        statuses = self._statuses()

        def has_failed(job: Overrides) -> bool:
            status = statuses[job]
            if _has_failed(status):  # an earlier start may have left a rung
                return True
            return not _is_done(status) and not any(map(is_the_rung, self._rungs(status)))

        self.leave([name for name in self.remaining if any(map(has_failed, self.candidates[name]))])

    def folder_of(self, name: str) -> str:
        """Return the folder's name of a candidate's first job; empty if the job has not begun."""
        status = self._statuses()[self.candidates[name][0]]
        return "" if status is None else status.folder

    def is_done(self, name: str) -> bool:
        """Return True if all jobs of a candidate have trained to their ends."""
        statuses = self._statuses()
        return all(_is_done(statuses[job]) for job in self.candidates[name])

    def keep(self, name: str) -> None:
        """Remove all other candidates, and all seeds but the first."""
        self.leave([other for other in self.remaining if other != name])
        first, *others = self.candidates[name]
        self._prune(others)
        self.candidates[name] = [first]

    def leave(self, names: Sequence[str]) -> None:
        """Remove candidates, and give their jobs the status `pruned`."""
        self.remaining = [name for name in self.remaining if name not in names]
        self._prune([job for name in names for job in self.candidates[name]])

    def _prune(self, jobs: Sequence[Overrides]) -> None:
        statuses = self._statuses()
        for status in (statuses[job] for job in jobs):
            if status is None or status.status == job_status.FAILED:
                continue
            folder = self.folder / status.folder
            with folder_lock(folder):
                result = read_result(folder)
                if result is not None and result.status not in (OK, FAILED, PRUNED):
                    replace(result, status=PRUNED).write(folder)
            job_status.write(self.folder, self.start, replace(status, status=job_status.PRUNED))

    def _statuses(self) -> dict[Overrides, JobStatus | None]:
        """Return the status of each job in this start of the sweep."""
        found = [(set(status.overrides), status) for status in job_status.read_all(self.folder, self.start)]
        return {
            job: next((status for overrides, status in found if overrides.issuperset(job)), None)
            for jobs in self.candidates.values()
            for job in jobs
        }

    def _rungs(self, status: JobStatus | None) -> list[Rung]:
        return [] if status is None else read_rungs(self.folder / status.folder)

    def _rung(self, status: JobStatus | None, step: int) -> Rung | None:
        # The newest entry comes last
        return next((rung for rung in reversed(self._rungs(status)) if rung.step == step), None)

    def _rows(self, status: JobStatus | None) -> str | None:
        """Return the fingerprint of a job's held-out rows; None if it is unknown."""
        result = None if status is None else read_result(self.folder / status.folder)
        return None if result is None else result.inputs.get("data.eval")


def _is_done(status: JobStatus | None) -> bool:
    return status is not None and status.status in (job_status.DONE, job_status.SKIPPED)


def _has_failed(status: JobStatus | None) -> bool:
    return status is not None and status.status == job_status.FAILED


def _without_seed(job: Iterable[str]) -> Overrides:
    return tuple(text for text in job if text.lstrip("+").partition("=")[0] != _SEED)
