"""A sweep's folder -> its jobs: what the files of each say, however much of them is there. Reads, never writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraplus_hydra.io import run_folder
from loraplus_hydra.io.read import Missing, Unreadable, read_json, read_lines, read_yaml
from loraplus_hydra.io.result import FAILED, INTERRUPTED, OK, PRUNED
from loraplus_hydra.report.overrides import override_values, overrides_again
from loraplus_hydra.report.values import flatten, number, resolved, whole

UNFINISHED, BROKEN = "unfinished", "broken"  # no result.json; a result.json that can't be read
SWEEP = "sweep.json"  # the sweep's name, its command and its swept keys, where the sweep wrote them
_UNTOLD = {INTERRUPTED: "stopped from outside", PRUNED: "ended early by a search", FAILED: "no error is told"}
_SIGNS_OF_A_JOB = (run_folder.RESULT, run_folder.CONFIG, run_folder.METRICS, run_folder.HYDRA)


@dataclass(frozen=True)
class Point:
    """One evaluation or one logged step of a job."""

    step: int
    value: float
    seconds: float | None = None  # since the job's training began


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of a parameter group's tensors and of their change in one step, at one logged step."""

    step: int
    weight: float
    update: float


@dataclass(frozen=True)
class Rates:
    """Learning rates of lora_A and lora_B before the schedule: eta_A and eta_B."""

    lr_A: float  # noqa: N815
    lr_B: float  # noqa: N815

    @property
    def ratio(self) -> float:
        return self.lr_B / self.lr_A


@dataclass(frozen=True)
class Job:
    """One job of a sweep, as its folder tells it."""

    folder: str  # its name inside the sweep's folder
    status: str  # ok | failed | interrupted | pruned | unfinished | broken
    reason: str = ""  # why it has no result, or what of it couldn't be read
    metric: str = ""  # the name of the metric that the sweep compares
    value: float | None = None  # that metric at the end
    best: float | None = None  # and at its best evaluation
    best_step: int | None = None
    steps: int | None = None
    seconds: float | None = None  # of the whole job
    seed: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # resolved; dotted key -> leaf
    whole_config: bool = False  # config.yaml was there, not only what Hydra composed
    overrides: tuple[str, ...] = ()
    again: tuple[str, ...] | None = None  # the overrides that run it again, where they are known: see asked.py
    rates: Rates | None = None
    evaluations: tuple[Point, ...] = ()  # of `metric`
    losses: tuple[Point, ...] = ()  # of training
    norms: Mapping[str, tuple[Norms, ...]] = field(default_factory=dict)  # group -> its norms
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether its metric takes part in comparisons: it ended well and has one."""
        return self.status == OK and self.value is not None


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, read."""

    folder: Path
    name: str
    command: str  # "" where nothing says it
    swept: tuple[str, ...]  # keys that sweep.json names
    jobs: tuple[Job, ...]
    metric: str
    greater_is_better: bool
    not_jobs: tuple[str, ...]  # sub-folders without anything of a job
    notes: tuple[str, ...]

    @property
    def unsuccessful(self) -> tuple[Job, ...]:
        """Jobs without a result, whatever the reason."""
        return tuple(job for job in self.jobs if not job.counts)


def collect(folder: Path) -> Sweep:
    """Read every direct sub-folder of `folder` that holds something of a job, in natural order of their names."""
    folders = sorted((one for one in folder.iterdir() if one.is_dir() and one.name[0] != "."), key=_natural)
    found = [one for one in folders if any((one / sign).exists() for sign in _SIGNS_OF_A_JOB)]
    notes = []
    told = {}
    try:
        told = read_json(folder / SWEEP)
    except Missing:
        pass
    except Unreadable as error:
        notes.append(f"{_inside(folder, error)}; the report goes by the jobs' own files")
    jobs = tuple(read_job(one) for one in found)
    named = [job.metric for job in jobs if job.counts] or [job.metric for job in jobs if job.metric]
    metric = Counter(named).most_common(1)[0][0] if named else "eval_loss"
    odd = [job.folder for job in jobs if job.metric and job.metric != metric]
    if odd:
        notes.append(f"Compared by {metric}; left out of the comparison, since they have another metric: {_some(odd)}")
        jobs = tuple(_without_value(job, metric) if job.metric not in ("", metric) else job for job in jobs)
    swept = told.get("swept")
    return Sweep(
        folder=folder,
        name=str(told.get("name") or folder.resolve().name),
        command=str(told.get("command") or ""),
        swept=tuple(map(str, swept)) if isinstance(swept, list) else (),
        jobs=jobs,
        metric=metric,
        greater_is_better=_direction(jobs, metric),
        not_jobs=tuple(one.name for one in folders if one not in found),
        notes=tuple(notes),
    )


def read_job(folder: Path) -> Job:
    """One job's folder. Never raises: what can't be read stands in `reason`."""
    trouble: list[str] = []

    def attempt(read: Any, *names: str, **kind: type) -> Any:
        try:
            return read(folder.joinpath(*names), **kind)
        except Missing:
            return None
        except Unreadable as error:
            trouble.append(_inside(folder, error))
            return None

    result = attempt(read_json, run_folder.RESULT)
    status, reason = _status(result, bool(trouble))
    config = attempt(read_yaml, run_folder.CONFIG)
    whole_config = config is not None
    if config is None:
        config = resolved(attempt(read_yaml, run_folder.HYDRA, "config.yaml") or {})
    leaves = flatten(config)
    overrides, again = _overrides(folder, attempt, leaves)
    again = None if trouble else again
    result = result or {}
    metric = str(result.get("metric") or leaves.get("task.metric") or "")
    lines = attempt(read_lines, run_folder.METRICS) or ()
    metrics, best = _mapping(result, "metrics"), _mapping(result, "best")
    value = number(metrics.get(metric))
    if status == OK and value is None:
        reason = f"its {run_folder.RESULT} has no number for {metric or 'its metric'}"
    seed = whole(leaves.get("seed", override_values(overrides).get("seed", result.get("seed"))))
    return Job(
        folder=folder.name,
        status=status,
        reason="; ".join(filter(None, (reason, *trouble))),
        metric=metric,
        value=value if status == OK else None,
        best=number(best.get("value")),
        best_step=whole(best.get("step")),
        steps=whole(result.get("steps")),
        seconds=number(result.get("seconds")),
        seed=seed,
        config=leaves,
        whole_config=whole_config,
        overrides=overrides,
        again=again,
        rates=_rates(attempt(read_json, run_folder.PARAM_GROUPS, kind=list) or (), leaves),
        evaluations=_curve(lines, metric),
        losses=_curve(lines, "loss"),
        norms=_norms(lines),
        device=str(result.get("device") or ""),
        versions={str(name): str(one) for name, one in _mapping(result, "versions").items()},
    )


def _overrides(
    folder: Path, attempt: Callable[..., Any], config: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Those that the job began with, and those that run it again as it is now, resumed or not."""
    begun_with = attempt(read_yaml, run_folder.HYDRA, "overrides.yaml", kind=list)
    if begun_with is None:
        return (), None
    texts = tuple(map(str, begun_with))
    resumes = sorted(path.name for path in (folder / run_folder.HYDRA).glob("resumed-*"))  # by the time in their names
    if not resumes:
        return texts, texts
    asked = [attempt(read_yaml, run_folder.HYDRA, one, "overrides.yaml", kind=list) or () for one in resumes]
    begun = flatten(resolved(attempt(read_yaml, run_folder.HYDRA, "config.yaml") or {}))
    return texts, overrides_again(texts, [str(text) for one in asked for text in one], begun, config)


def _status(result: Any, unreadable: bool) -> tuple[str, str]:
    if unreadable:
        return BROKEN, ""
    if result is None:
        return UNFINISHED, f"no {run_folder.RESULT}: it was killed, or it still runs"
    status = result.get("status")
    if status not in (OK, FAILED, INTERRUPTED, PRUNED):
        return BROKEN, f"{run_folder.RESULT} has no status that is known"
    error = _mapping(result, "error")
    told = ": ".join(str(error[part]) for part in ("type", "text") if error.get(part))
    return status, told or _UNTOLD.get(status, "")


def _rates(tensors: Iterable[Any], config: Mapping[str, Any]) -> Rates | None:
    """eta_A and eta_B as the tensors had them; of a job that never came so far, as its config asks for them."""
    found: dict[str, float | None] = {}
    known = [one for one in tensors if isinstance(one, dict) and number(one.get("lr")) is not None]
    for key, side in (("group", {"groupA": "A", "groupB": "B"}), ("role", {"lora_A": "A", "lora_B": "B"})):
        for tensor in known:
            if str(tensor.get(key)) in side:
                found.setdefault(side[tensor[key]], number(tensor["lr"]))
    base = number(config.get("optimizer.lr"))
    ratio = number(config.get("loraplus.ratio")) if "loraplus.ratio" in config else 1.0
    given_A, given_B = number(config.get("loraplus.lr_A")), number(config.get("loraplus.lr_B"))
    product = base * ratio if base is not None and ratio is not None else None
    lr_A = found.get("A", base if given_A is None else given_A)
    lr_B = found.get("B", product if given_B is None else given_B)
    return Rates(lr_A, lr_B) if lr_A and lr_B and lr_A > 0 and lr_B > 0 else None


def _curve(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[Point, ...]:
    """The values of `key` over the steps. A resumed job logs some steps again: the later line counts."""
    points = {}
    for line in lines:
        step, value = whole(line.get("step")), number(line.get(key))
        if step is not None and step >= 0 and value is not None:
            points[step] = Point(step, value, number(line.get("seconds")))
    return tuple(points[step] for step in sorted(points))


def _norms(lines: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Norms, ...]]:
    groups: dict[str, dict[int, Norms]] = {}
    for line in lines:
        step = whole(line.get("step"))
        for group, pair in _mapping(line, "norms").items():
            if not isinstance(pair, dict):
                continue
            weight, update = number(pair.get("weight")), number(pair.get("update"))
            if step is not None and weight is not None and update is not None:
                groups.setdefault(str(group), {})[step] = Norms(step, weight, update)
    return {group: tuple(steps[step] for step in sorted(steps)) for group, steps in groups.items()}


def _direction(jobs: Iterable[Job], metric: str) -> bool:
    told = [job.config["task.greater_is_better"] for job in jobs if job.metric == metric and _says_direction(job)]
    return bool(Counter(told).most_common(1)[0][0]) if told else False


def _says_direction(job: Job) -> bool:
    return isinstance(job.config.get("task.greater_is_better"), bool)


def _without_value(job: Job, metric: str) -> Job:
    reason = "; ".join(filter(None, (job.reason, f"compared by {job.metric}, not {metric}")))
    return replace(job, value=None, best=None, best_step=None, evaluations=(), reason=reason)


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _inside(folder: Path, error: Unreadable) -> str:
    return str(error).removeprefix(f"{folder}/")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
