"""Reader of a sweep's folder and its jobs. Broken files are reported, not errors."""

from __future__ import annotations

import functools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraplus_hydra.config.schema import NOT_OF_A_RUN
from loraplus_hydra.errors import first_of
from loraplus_hydra.io import run_folder
from loraplus_hydra.io.read import Missing, Unreadable, inside, read_json, read_lines, read_yaml
from loraplus_hydra.io.result import FAILED, INTERRUPTED, OK, PRUNED, WAITING
from loraplus_hydra.report.values import flatten, number, override_values, rerun_overrides, resolved, whole_number

UNFINISHED, BROKEN = "unfinished", "broken"  # the job has no result.json; its result.json can't be read
_DEFAULT_REASONS = {
    INTERRUPTED: "stopped by a signal",
    WAITING: "stopped at a rung of a search that has not ended",
    PRUNED: "ended early by a search",
    FAILED: "no error stored",
}
_JOB_FILES = (run_folder.RESULT, run_folder.CONFIG, run_folder.METRICS, run_folder.HYDRA)


@dataclass(frozen=True)
class Point:
    """One evaluation or one logged step of a job."""

    step: int
    value: float
    seconds: float | None = None  # seconds since the job's training began


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of a group's tensors and of their change in one step."""

    step: int
    weight: float
    update: float


@dataclass(frozen=True)
class Rates:
    """Learning rates of lora_A (eta_A) and lora_B (eta_B), before the schedule."""

    lr_A: float  # noqa: N815
    lr_B: float  # noqa: N815

    @property
    def ratio(self) -> float:
        return self.lr_B / self.lr_A


@dataclass(frozen=True)
class Job:
    """One job of a sweep, read from its folder."""

    folder: str  # the folder's name inside the sweep's folder
    status: str  # ok | failed | interrupted | waiting | pruned | unfinished | broken
    reason: str = ""  # why the job has no result, and which of its files can't be read
    metric: str = ""  # name of the metric that the sweep compares
    value: float | None = None  # the metric at the end
    best: float | None = None  # the metric at the best evaluation
    steps: int | None = None
    seconds: float | None = None  # seconds of the whole job
    seed: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # resolved; dotted key -> value
    whole_config: bool = False  # True if `config` is config.yaml, False if it is Hydra's copy
    overrides: tuple[str, ...] = ()
    rerun: tuple[str, ...] | None = None  # the overrides that run the job again, if known
    rates: Rates | None = None
    evaluations: tuple[Point, ...] = ()  # values of `metric`
    losses: tuple[Point, ...] = ()  # training losses
    norms: Mapping[str, tuple[Norms, ...]] = field(default_factory=dict)  # group -> norms
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def given(self) -> Mapping[str, Any]:
        """Return the values of the run's keys in `overrides`, by key."""
        given = override_values(self.overrides)
        return {key: value for key, value in given.items() if key.split(".")[0] not in NOT_OF_A_RUN}

    @property
    def has_result(self) -> bool:
        """Return True if the job was successful and has the metric."""
        return self.status == OK and self.value is not None

    @property
    def left_at(self) -> int | None:
        """The step at which the job left a search; None for any other job."""
        return self.steps if self.status == PRUNED else None


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
    extend: str = ""  # the command of `tune` with candidates beyond the edge

    @property
    def unsuccessful(self) -> tuple[Job, ...]:
        """All jobs without a result, except those that left a search."""
        return tuple(job for job in self.jobs if not job.has_result and job.status != PRUNED)

    @property
    def pruned(self) -> tuple[Job, ...]:
        """The jobs that left a search. The first to leave comes last."""
        return tuple(sorted((job for job in self.jobs if job.status == PRUNED), key=lambda job: -(job.left_at or 0)))


def read_sweep(folder: Path) -> Sweep:
    """Read all direct sub-folders with a job's files, in natural order of names."""
    folders = sorted((one for one in folder.iterdir() if one.is_dir() and one.name[0] != "."), key=_natural_order)
    job_folders = [one for one in folders if any((one / name).exists() for name in _JOB_FILES)]
    files = _Files(folder)
    stored = files.read(read_json, run_folder.SWEEP) or {}
    notes = [f"{error}; the report uses the jobs' own files" for error in files.errors]
    jobs = tuple(read_job(one) for one in job_folders)
    named = [job.metric for job in jobs if job.has_result] or [job.metric for job in jobs if job.metric]
    metric = Counter(named).most_common(1)[0][0] if named else "eval_loss"
    if others := [job.folder for job in jobs if job.metric not in ("", metric)]:
        notes.append(f"Jobs are compared by {metric}. Jobs with another metric are ignored: {first_of(others, 5)}")
        jobs = tuple(_without_value(job, metric) if job.folder in others else job for job in jobs)
    notes += _stopped(stored.get("left"))
    decisions = files.read(read_json, run_folder.HALVING) or {}
    tuned = files.read(read_json, run_folder.TUNE) or {}
    if any(job.status == PRUNED for job in jobs):  # not if the whole grid was trained later
        notes += _halved(decisions)
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
        rungs=_rungs(tuned or decisions, by_loss=by_loss),
        rungs_by_loss=by_loss,
        answer=tuple(map(str, tuned.get("answer") or ())) if isinstance(tuned.get("answer"), list) else (),
        extend=_own_command(tuned.get("extend")),
    )


def read_job(folder: Path) -> Job:
    """Read one job's folder. Files that can't be read are listed in `reason`, without an error."""
    files = _Files(folder)
    result = files.read(read_json, run_folder.RESULT)
    status, reason = _status(result, broken=bool(files.errors))
    result = result or {}
    config, whole_config = _config(files)
    overrides, rerun = _overrides(files, config)
    lines = files.read(read_lines, run_folder.METRICS) or ()
    rates = _rates(files.read(read_json, run_folder.PARAM_GROUPS, kind=list) or (), config)
    metric = str(result.get("metric") or config.get("task.metric") or "")
    value = number(_mapping(result, "metrics").get(metric)) if status == OK else None
    if status == OK and value is None:
        reason = f"{run_folder.RESULT} has no number for {metric or 'the metric'}"
    return Job(
        folder=folder.name,
        status=status,
        reason="; ".join(filter(None, (reason, *files.errors))),
        metric=metric,
        value=value,
        best=number(_mapping(result, "best").get("value")),
        steps=whole_number(result.get("steps")),
        seconds=number(result.get("seconds")),
        seed=whole_number(config.get("seed", override_values(overrides).get("seed", result.get("seed")))),
        config=config,
        whole_config=whole_config,
        overrides=overrides,
        rerun=rerun,
        rates=rates,
        evaluations=_curve(lines, metric),
        losses=_curve(lines, "loss"),
        norms=_norms(lines),
        device=str(result.get("device") or ""),
        versions={str(name): str(version) for name, version in _mapping(result, "versions").items()},
    )


class _Files:
    """Reader of a folder's files that collects the errors of unreadable files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors: list[str] = []

    def read(self, reader: Any, *names: str, **kind: type) -> Any:
        """Read a file; return None if it is missing or can't be read."""
        try:
            return reader(inside(self.folder, *names), **kind)
        except Missing:
            return None
        except Unreadable as error:
            self.errors.append(str(error).removeprefix(f"{self.folder}/"))
            return None


def _status(result: Any, *, broken: bool) -> tuple[str, str]:
    """Return a job's status and the reason why it has no result."""
    if broken:
        return BROKEN, ""
    if result is None:
        return UNFINISHED, f"no {run_folder.RESULT}: it was killed or is still running"
    status = result.get("status")
    if status not in (OK, FAILED, INTERRUPTED, WAITING, PRUNED):
        return BROKEN, f"{run_folder.RESULT} has no known status"
    error = _mapping(result, "error")
    reason = ": ".join(str(error[part]) for part in ("type", "text") if error.get(part))
    return status, reason or _DEFAULT_REASONS.get(status, "")


def _config(files: _Files) -> tuple[dict[str, Any], bool]:
    """Return the job's config, and False if it is only Hydra's copy."""
    config = files.read(read_yaml, run_folder.CONFIG)  # a job that failed early has no config.yaml
    return (_hydra_config(files), False) if config is None else (flatten(config), True)


def _hydra_config(files: _Files) -> dict[str, Any]:
    return flatten(resolved(files.read(read_yaml, run_folder.HYDRA, "config.yaml") or {}))


def _overrides(files: _Files, config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the overrides of the job's first start, and the overrides that run the job again."""
    first = files.read(read_yaml, run_folder.HYDRA, "overrides.yaml", kind=list)
    if first is None:
        return (), None
    # The program gives each job its sweep's own keys
    texts = tuple(text for text in map(str, first) if not text.startswith("sweep."))
    rerun: tuple[str, ...] | None = texts
    # The names are times, so this is their order
    resumes = sorted(path.name for path in (files.folder / run_folder.HYDRA).glob("resumed-*"))
    if resumes:
        changes = [files.read(read_yaml, run_folder.HYDRA, one, "overrides.yaml", kind=list) or () for one in resumes]
        rerun = rerun_overrides(texts, [str(text) for one in changes for text in one], _hydra_config(files), config)
    return texts, None if files.errors else rerun


def _rates(tensors: Iterable[Any], config: Mapping[str, Any]) -> Rates | None:
    """Return eta_A and eta_B from param_groups.json, or else from the config."""
    used: dict[str, float | None] = {}
    known = [one for one in tensors if isinstance(one, dict) and number(one.get("lr")) is not None]
    for key, sides in (("group", {"groupA": "A", "groupB": "B"}), ("role", {"lora_A": "A", "lora_B": "B"})):
        for tensor in known:
            if str(tensor.get(key)) in sides:
                used.setdefault(sides[tensor[key]], number(tensor["lr"]))
    base = number(config.get("optimizer.lr"))
    ratio = number(config.get("loraplus.ratio")) if "loraplus.ratio" in config else 1.0
    given_A, given_B = number(config.get("loraplus.lr_A")), number(config.get("loraplus.lr_B"))
    product = base * ratio if base is not None and ratio is not None else None
    lr_A = used.get("A", base if given_A is None else given_A)
    lr_B = used.get("B", product if given_B is None else given_B)
    return Rates(lr_A, lr_B) if lr_A and lr_B and lr_A > 0 and lr_B > 0 else None


def _curve(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    """Return the values of `key` over the steps."""
    points = {}
    for line in lines:
        step, value = whole_number(line.get("step")), number(line.get(key))
        if step is not None and step >= 0 and value is not None:
            points[step] = Point(step, value, number(line.get("seconds")))  # a resumed job logs some steps again
    return tuple(points[step] for step in sorted(points))


def _norms(lines: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Norms, ...]]:
    groups: dict[str, dict[int, Norms]] = {}
    for line in lines:
        step = whole_number(line.get("step"))
        for group, pair in _mapping(line, "norms").items():
            if not isinstance(pair, dict):
                continue
            weight, update = number(pair.get("weight")), number(pair.get("update"))
            if step is not None and weight is not None and update is not None:
                groups.setdefault(str(group), {})[step] = Norms(step, weight, update)
    return {group: tuple(steps[step] for step in sorted(steps)) for group, steps in groups.items()}


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


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _natural_order(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)]
