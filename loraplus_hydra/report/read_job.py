"""One job of a sweep, read from its folder. Broken files are reported, not errors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplus_hydra.config.plain import without_credentials
from loraplus_hydra.config.schema import NOT_OF_A_RUN
from loraplus_hydra.io import run_folder
from loraplus_hydra.io.read import Missing, Unreadable, inside, read_json, read_lines, read_yaml
from loraplus_hydra.io.result import FAILED, INTERRUPTED, OK, PRUNED, WAITING
from loraplus_hydra.io.rungs import Rung, read_rungs
from loraplus_hydra.report.formatting import measured
from loraplus_hydra.report.values import flatten, number, override_values, rerun_overrides, resolved, whole_number

# The job has no result.json; its result.json can't be read; a process trains it now
UNFINISHED, BROKEN, RUNNING = "unfinished", "broken", "running"
_DEFAULT_REASONS = {
    INTERRUPTED: "stopped by a signal",
    WAITING: "stopped at a rung of a search that has not ended",
    PRUNED: "ended early by a search",
    FAILED: "no error stored",
}


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
    status: str  # ok | failed | interrupted | waiting | pruned | running | unfinished | broken
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
    rungs: tuple[Rung, ...] = ()  # of a search
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
    def progress(self) -> str:
        """The last logged step and metric of a job in progress: `step 40 of 100, eval_loss 3.6170`."""
        step = max((curve[-1].step for curve in (self.evaluations, self.losses) if curve), default=0)
        total = whole_number(self.config.get("trainer.max_steps")) or 0
        text = f"step {step:,}" + (f" of {total:,}" if total > 0 else "")
        return text + (f", {self.metric} {measured(self.evaluations[-1].value)}" if self.evaluations else "")

    @property
    def left_at(self) -> int | None:
        """The step at which the job left a search; None for any other job."""
        return self.steps if self.status == PRUNED else None


def read_job(folder: Path) -> Job:
    """Read one job's folder. Files that can't be read are listed in `reason`, without an error."""
    files = Files(folder)
    result = files.read(read_json, run_folder.RESULT)
    status, reason = _status(result, broken=bool(files.errors))
    result = result or {}
    config, whole_config = _config(files)
    overrides, rerun = _overrides(files, config)
    lines = files.read(read_lines, run_folder.METRICS) or ()
    rates = _rates(files.read(read_json, run_folder.PARAM_GROUPS, kind=list) or (), config)
    metric = str(result.get("metric") or config.get("task.metric") or "")
    value = number(mapping(result, "metrics").get(metric)) if status == OK else None
    if status == OK and value is None:
        reason = f"{run_folder.RESULT} has no number for {metric or 'the metric'}"
    return Job(
        folder=folder.name,
        status=status,
        reason="; ".join(filter(None, (reason, *files.errors))),
        metric=metric,
        value=value,
        best=number(mapping(result, "best").get("value")),
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
        rungs=tuple(read_rungs(folder)),
        device=str(result.get("device") or ""),
        versions={str(name): str(version) for name, version in mapping(result, "versions").items()},
    )


class Files:
    """Reader of a folder's files that collects the errors of unreadable files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors: list[str] = []

    def read(self, reader: Any, *names: str, **kind: type) -> Any:
        """Read a file; return None if it is missing or can't be read.

        Addresses lose their user and password, because other people may read a report.
        """
        try:
            found = reader(inside(self.folder, *names), **kind)
            return found if reader is read_lines else without_credentials(found)  # lines have only numbers
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
        return UNFINISHED, f"no {run_folder.RESULT}: it was killed, or runs on another machine"
    status = result.get("status")
    if status not in (OK, FAILED, INTERRUPTED, WAITING, PRUNED):
        return BROKEN, f"{run_folder.RESULT} has no known status"
    error = mapping(result, "error")
    reason = ": ".join(str(error[part]) for part in ("type", "text") if error.get(part))
    return status, reason or _DEFAULT_REASONS.get(status, "")


def _config(files: Files) -> tuple[dict[str, Any], bool]:
    """Return the job's config, and False if it is only Hydra's copy."""
    config = files.read(read_yaml, run_folder.CONFIG)  # a job that failed early has no config.yaml
    return (_hydra_config(files), False) if config is None else (flatten(config), True)


def _hydra_config(files: Files) -> dict[str, Any]:
    return flatten(resolved(files.read(read_yaml, run_folder.HYDRA, "config.yaml") or {}))


def _overrides(files: Files, config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
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
        for group, pair in mapping(line, "norms").items():
            if not isinstance(pair, dict):
                continue
            weight, update = number(pair.get("weight")), number(pair.get("update"))
            if step is not None and weight is not None and update is not None:
                groups.setdefault(str(group), {})[step] = Norms(step, weight, update)
    return {group: tuple(steps[step] for step in sorted(steps)) for group, steps in groups.items()}


def mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}
