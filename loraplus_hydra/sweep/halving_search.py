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
from loraplus_hydra.io import screen
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.result import FAILED, OK, PRUNED, read_result
from loraplus_hydra.io.run_folder import HALVING
from loraplus_hydra.io.rungs import Rung, read_rungs
from loraplus_hydra.sweep import halving, job_status
from loraplus_hydra.sweep.halving import Standing, Stop
from loraplus_hydra.sweep.job_status import JobStatus
from loraplus_hydra.sweep.plan import GRID, Sweep, grid_of, swept_overrides

_SWEEPER = "hydra_plugins.loraplus_halving.HalvingSweeper"
_SEED = "seed="
_LENGTHS = ("trainer.max_steps", "trainer.num_train_epochs")
_MOST_SHOWN = 4

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
            config.hydra.sweeper = {**grid, "_target_": _SWEEPER, "start": sweep.start.name}


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
    if OmegaConf.select(config, "trainer.early_stopping_patience") is not None:
        yield Problem("trainer.early_stopping_patience", "halving compares jobs at the same steps", "set it to null")
    for key in _LENGTHS:
        if any(one.key_or_group == key for one in swept):
            yield Problem(key, "halving compares jobs with the same number of steps", "give it one value")
    subdir = str(OmegaConf.to_container(config.hydra.sweep, resolve=False))
    if "hydra.job.num" in subdir or "hydra.job.id" in subdir:
        yield Problem("hydra.sweep.subdir", "a job gets a new number at each rung", "name the folder by other values")


def batches(jobs: Sequence[Sequence[str]], folder: Path, start: str) -> Iterator[list[Overrides]]:
    """Yield the jobs that are launched together: those of each rung, then those that finish.

    `jobs` has the overrides of each job. `folder` and `start` are the sweep's. A batch must have ended before the next
    one is taken. Raises UserError if the jobs can't be compared.
    """
    search = _Search(jobs, folder, start)
    share = halving.first_share(len(search.candidates))
    if share is not None:
        yield from search.batch(search.remaining, share)
        search.make_plan(share)
    for number, stop in enumerate(search.stops):
        if len(search.remaining) <= stop.keep:
            continue
        yield from search.batch_until(stop.step)
        search.decide(number)
    yield from search.batch(search.remaining)
    search.end()


class _Search:
    """A search in progress: the remaining candidates, and the steps that were taken."""

    def __init__(self, jobs: Sequence[Sequence[str]], folder: Path, start: str) -> None:
        self.folder = folder
        self.start = start
        self.candidates: dict[str, list[Overrides]] = {}  # name -> a job for each seed
        common = set.intersection(*map(set, jobs))
        for job in dict.fromkeys(map(tuple, jobs)):
            name = " ".join(text for text in _without_seed(job) if text not in common)
            self.candidates.setdefault(name, []).append(job)
        self.remaining = list(self.candidates)
        self.steps = 0  # of one job; 0 = unknown
        self.stops: tuple[Stop, ...] = ()
        self.decisions: list[tuple[Stop, list[Standing]]] = []
        self.reached = 0  # the step of the last rung
        self.spent = 0  # steps of all candidates, with one seed

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

    def make_plan(self, share: float) -> None:
        """Plan the rungs. The number of steps is known once jobs have been at the first rung, `share`."""
        self._remove_failed(lambda rung: rung.stop_at == share)
        found = [rung for status in self._statuses().values() for rung in self._rungs(status) if rung.stop_at == share]
        if not found:  # all jobs have failed, or had run to their ends before
            return
        self.steps = found[0].steps
        if other := next((rung.steps for rung in found if rung.steps != self.steps), None):
            raise UserError(f"the jobs have different numbers of steps ({self.steps} and {other}): use halving=false")
        self.stops = halving.plan(len(self.candidates), self.steps, max(rung.earliest for rung in found))
        if not self.stops:
            screen.show(f"Halving: {self.steps} steps are too few for a rung, so every job runs to its end")

    def decide(self, number: int) -> None:
        """Decide which candidates stay at a rung, and record it. All jobs have been there, or have failed."""
        stop = self.stops[number]
        self._spend_until(stop.step)
        self._remove_failed(lambda rung: rung.step == stop.step)
        rungs = self._compared(stop.step)
        more = halving.places(len(self.candidates), self.stops, self.steps, number, self.spent)
        standings = halving.decide(rungs, stop.keep, more) if rungs else []
        self.decisions.append((stop, standings))
        self._leave([one.name for one in standings if not one.stays])
        self._write()
        names = first_of([f"{one.name} ({one.loss:.4f})" for one in standings if one.stays], _MOST_SHOWN)
        screen.show(f"Halving: {len(self.remaining)} of {len(self.candidates)} stay at step {stop.step}: {names}")

    def end(self) -> None:
        """Record the steps that the remaining candidates have taken to their end."""
        if self.stops:
            self._spend_until(self.steps)
            self._write()

    def _spend_until(self, step: int) -> None:
        self.spent += len(self.remaining) * (step - self.reached)
        self.reached = step

    def _compared(self, step: int) -> dict[str, list[Rung]]:
        """Return the rungs of the candidates that are compared at `step`."""
        statuses = self._statuses()
        rungs = {name: [self._rung(statuses[job], step) for job in self.candidates[name]] for name in self.remaining}
        # A job that the same sweep without halving has trained beyond the rung continues without a comparison
        known = {name: [rung for rung in each if rung is not None and rung.losses] for name, each in rungs.items()}
        known = {name: each for name, each in known.items() if len(each) == len(self.candidates[name])}
        if len({len(rung.losses) for each in known.values() for rung in each}) > 1:
            raise UserError("the jobs have different held-out rows, so they can't be compared: use halving=false")
        return known

    def _remove_failed(self, is_the_rung: Callable[[Rung], bool]) -> None:
        """Remove the candidates with a job that failed before it was at the rung."""
        statuses = self._statuses()

        def has_failed(job: Overrides) -> bool:
            return not _is_done(statuses[job]) and not any(map(is_the_rung, self._rungs(statuses[job])))

        self._leave([name for name in self.remaining if any(map(has_failed, self.candidates[name]))])

    def _leave(self, names: Sequence[str]) -> None:
        """Remove candidates, and give their jobs the status `pruned`."""
        self.remaining = [name for name in self.remaining if name not in names]
        statuses = self._statuses()
        for status in (statuses[job] for name in names for job in self.candidates[name]):
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
        return next((rung for rung in self._rungs(status) if rung.step == step), None)

    def _write(self) -> None:
        seeds = max(map(len, self.candidates.values()))
        content = {
            "steps": self.steps,
            "job_steps": self.spent * seeds,
            "of": len(self.candidates) * self.steps * seeds,
            "rungs": [
                {"step": stop.step, "keep": stop.keep, "candidates": [asdict(one) for one in standings]}
                for stop, standings in self.decisions
            ],
        }
        write_text(self.folder / HALVING, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _is_done(status: JobStatus | None) -> bool:
    return status is not None and status.status in (job_status.DONE, job_status.SKIPPED)


def _without_seed(job: Iterable[str]) -> Overrides:
    return tuple(text for text in job if not text.startswith(_SEED))
