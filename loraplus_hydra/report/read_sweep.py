"""Reader of a sweep's folder and its jobs. Broken files are reported, not errors."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraplus_hydra.errors import first_of
from loraplus_hydra.io import job_status, run_folder
from loraplus_hydra.io.job_status import JobStatus
from loraplus_hydra.io.locks import is_locked
from loraplus_hydra.io.read import read_json
from loraplus_hydra.io.result import OK, PRUNED, WAITING
from loraplus_hydra.report.read_job import RUNNING, Files, Job, mapping, read_job
from loraplus_hydra.report.values import number, whole_number

_JOB_FILES = (run_folder.RESULT, run_folder.CONFIG, run_folder.METRICS, run_folder.HYDRA)


@dataclass(frozen=True)
class RungLosses:
    """The candidates of a search at a rung: each one's metric or loss, and True if it stays."""

    step: int
    values: Mapping[str, tuple[float, bool]]


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder."""

    folder: Path
    name: str
    command: str  # "" if unknown
    swept: tuple[str, ...]  # the swept keys in sweep.json
    jobs: tuple[Job, ...]
    metric: str
    greater_is_better: bool
    not_jobs: tuple[str, ...]  # sub-folders without any file of a job
    notes: tuple[str, ...]
    rungs: tuple[RungLosses, ...] = ()  # of a search by halving or `tune`
    rungs_by_loss: bool = True  # False if `rungs` has the values of `metric`
    answer: tuple[str, ...] = ()  # of `tune`, in sentences
    chosen: str = ""  # the folder of the job that `tune` chose
    extend: str = ""  # the command of `tune` with candidates beyond the edge
    is_active: bool = False  # True while a process runs jobs
    not_begun: int = 0  # number of jobs of the active sweep that have no folder yet; 0 if unknown

    @property
    def in_progress(self) -> tuple[Job, ...]:
        """The jobs that are running, or that wait at a rung of an active search."""
        states = (RUNNING, WAITING) if self.is_active else (RUNNING,)
        return tuple(job for job in self.jobs if job.status in states)

    @property
    def unsuccessful(self) -> tuple[Job, ...]:
        """All other jobs without a result, except those that left a search."""
        others = {job.folder for job in (*self.in_progress, *self.pruned)}
        return tuple(job for job in self.jobs if not job.has_result and job.folder not in others)

    @property
    def pruned(self) -> tuple[Job, ...]:
        """The jobs that left a search. The first to leave comes last."""
        return tuple(sorted((job for job in self.jobs if job.status == PRUNED), key=lambda job: -(job.left_at or 0)))


def read_sweep(folder: Path) -> Sweep:
    """Read all direct sub-folders with a job's files, in natural order of names."""
    folders = sorted((one for one in folder.iterdir() if one.is_dir() and one.name[0] != "."), key=_natural_order)
    job_folders = [one for one in folders if any((one / name).exists() for name in _JOB_FILES)]
    files = Files(folder)
    stored = files.read(read_json, run_folder.SWEEP) or {}
    notes = [f"{error}; the report uses the jobs' own files" for error in files.errors]
    begun = job_status.read_active(folder)
    jobs = tuple(_as_it_runs(one, begun) for one in job_folders)
    named = [job.metric for job in jobs if job.has_result] or [job.metric for job in jobs if job.metric]
    metric = Counter(named).most_common(1)[0][0] if named else "eval_loss"
    if others := [job.folder for job in jobs if job.metric not in ("", metric)]:
        notes.append(f"Jobs are compared by {metric}. Jobs with another metric are ignored: {first_of(others, 5)}")
        jobs = tuple(_without_value(job, metric) if job.folder in others else job for job in jobs)
    notes += _stopped(stored.get("left"))
    decisions = files.read(read_json, run_folder.HALVING) or {}
    tuned = files.read(read_json, run_folder.TUNE) or {}
    if tuned.get("command", stored.get("command")) != stored.get("command"):  # the answer of an earlier search
        tuned = {}
    answer = tuple(map(str, tuned["answer"])) if isinstance(tuned.get("answer"), list) else ()
    is_halved = any(job.status == PRUNED for job in jobs)  # not if the whole grid was trained later
    notes += _halved(decisions) if is_halved else []
    by_loss = not _have_metrics(tuned or decisions)
    swept = stored.get("swept")
    return Sweep(
        folder=folder,
        name=str(stored.get("name") or folder.resolve().name),
        command=str(stored.get("command") or ""),
        swept=tuple(map(str, swept)) if isinstance(swept, list) else (),
        jobs=jobs,
        metric=metric,
        greater_is_better=_greater_is_better(jobs, metric),
        not_jobs=tuple(one.name for one in folders if one not in job_folders and one.name != run_folder.TUNED),
        notes=tuple(notes),
        rungs=_rungs(tuned or decisions, by_loss=by_loss) if is_halved else (),
        rungs_by_loss=by_loss,
        answer=answer,
        chosen=str(mapping(tuned, "winner").get("job") or "") if answer else "",
        extend=_own_command(tuned.get("extend")),
        is_active=begun is not None or any(job.status == RUNNING for job in jobs),
        not_begun=max((whole_number(stored.get("jobs")) or 0) - len(jobs), 0) if begun is not None else 0,
    )


def _as_it_runs(folder: Path, begun: Iterable[JobStatus] | None) -> Job:
    """Return the job in `folder`, with the status `running` if a process trains it now.

    `begun` has the jobs of the sweep's active starts; without such a start, a job's lock decides.
    """
    job = read_job(folder)
    if job.status in (OK, PRUNED):
        return job
    if begun is None:
        is_running = is_locked(folder) is True
    else:
        is_running = any(one.folder == job.folder and one.status == job_status.RUNNING for one in begun)
    return replace(job, status=RUNNING, reason="") if is_running else job


def _greater_is_better(jobs: Iterable[Job], metric: str) -> bool:
    """Return the value of greater_is_better in most jobs' configs; False without any."""
    values = [job.config.get("task.greater_is_better") for job in jobs if job.metric == metric]
    known = Counter(value for value in values if isinstance(value, bool))
    return known.most_common(1)[0][0] if known else False


def _stopped(left: Any) -> list[str]:
    """Return a note on the jobs that a stopped sweep has not begun."""
    if not isinstance(left, list) or not left:
        return []
    return [f"The sweep was stopped before {len(left)} jobs: {first_of(list(map(str, left)), 5)}"]


def _halved(stored: Mapping[str, Any]) -> list[str]:
    """Return a note on the cost of a halved sweep."""
    taken, of = number(stored.get("job_steps")), number(stored.get("of"))
    if taken is None or not of:
        return []
    return [f"Successive halving: {taken:,.0f} of the grid's {of:,.0f} steps were taken ({taken / of:.0%})."]


def _own_command(text: Any) -> str:
    """Return a command of this program, quoted anew; empty for any other text."""
    try:
        words = shlex.split(str(text or ""))
    except ValueError:
        return ""
    return shlex.join(words) if words[:3] == ["python", "-m", "loraplus_hydra"] else ""


def _have_metrics(stored: Mapping[str, Any]) -> bool:
    """Return True if all candidates of halving.json or tune.json have the metric at all rungs."""
    rungs = _list_of_mappings(stored, "rungs")
    candidates = [one for entry in rungs for one in _list_of_mappings(entry, "candidates")]
    return bool(candidates) and all(number(one.get("metric")) is not None for one in candidates)


def _rungs(stored: Mapping[str, Any], *, by_loss: bool) -> tuple[RungLosses, ...]:
    """Return the rungs of halving.json or tune.json. Entries that can't be read are left out."""
    rungs = []
    for entry in _list_of_mappings(stored, "rungs"):
        values = {}
        for one in _list_of_mappings(entry, "candidates"):
            value = number(one.get("loss" if by_loss else "metric"))
            if value is not None:
                values[str(one.get("name"))] = (value, one.get("stays") is True)
        step = whole_number(entry.get("step"))
        if step is not None and values:
            rungs.append(RungLosses(step, values))
    return tuple(rungs)


def _list_of_mappings(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    inner = value.get(key)
    return [one for one in inner if isinstance(one, dict)] if isinstance(inner, list) else []


def _without_value(job: Job, metric: str) -> Job:
    reason = "; ".join(filter(None, (job.reason, f"compared by {job.metric}, not {metric}")))
    return replace(job, value=None, best=None, evaluations=(), reason=reason)


def _natural_order(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)]
