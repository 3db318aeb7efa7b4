"""report.html: one page without external files, from a template that escapes every value."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loraplus_hydra.io.result import OK
from loraplus_hydra.io.text import presentable
from loraplus_hydra.report import summary
from loraplus_hydra.report.compare import Reach
from loraplus_hydra.report.figures.style import Picture
from loraplus_hydra.report.formatting import ABSENT, count, measured, short, with_spread
from loraplus_hydra.report.read_job import Job
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import value_of
from loraplus_hydra.report.values import number

_TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=lambda value: presentable(value) if type(value) is str else value,  # a Markup is this program's own HTML
    trim_blocks=True,
    lstrip_blocks=True,
)
_LONGEST_LINE = 120  # maximum number of characters of a reason before it is folded
_LONGEST_REASON = 8000
_FACTS = (
    ("model", "model.path"),
    ("adapter", "adapter._target_", "adapter.r", "adapter.lora_alpha"),
    ("optimizer", "optimizer._target_"),
    ("schedule", "scheduler._target_"),
    ("task", "task._target_"),
)
_DATA = ("data.name", "data.path", "data.train", "data._target_")  # the first of these keys that is set is shown


def page(results: SweepResults, figures: Sequence[Picture], *, live: bool = False) -> str:
    """Return the page as HTML.

    The page's Content-Security-Policy allows no requests and only its own scripts, so texts of jobs can't run scripts.
    A `live` page loads itself again every few seconds, and links to no other file of the report.
    """
    names = ("table.js.jinja", *(("live.js.jinja",) if live else ()))
    scripts = [(_TEMPLATES / name).read_text(encoding="utf-8") for name in names]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    return _ENVIRONMENT.get_template("page.html.jinja").render(
        **_texts(results),
        results=results,
        outcome=results.outcome,
        style=Markup((_TEMPLATES / "style.css.jinja").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {sources}",
        written=f"{datetime.now():%H:%M:%S}" if live else "",
        figures=figures,
        reached=[_reach_row(results, reach) for reach in results.outcome.reached],
        columns=_columns(results),
        rows=[_row(results, job) for job in results.jobs_best_first],
        statuses=sorted({job.status for job in results.sweep.jobs}),
        in_progress=results.sweep.in_progress,
        left=_left(results),
        troubles=_troubles(results),
        link=_link,
        count=count,
    )


def _texts(results: SweepResults) -> dict[str, Any]:
    jobs = results.sweep.jobs
    varied = ", ".join(results.names[key] for key in results.keys)
    beyond, extending = summary.extension(results)
    return {
        "title": results.sweep.name,
        "overview": summary.overview(results.sweep) + (f"; varied: {varied}." if varied else "."),
        "headline": summary.headline(results),
        "details": summary.details(results),
        "speed": summary.speed_sentence(results),
        "best_command": summary.command(results),
        "beyond": beyond,
        "extending_command": extending,
        "facts": [*_config_facts(jobs), *_run_facts(results)],
    }


def _config_facts(jobs: Sequence[Job]) -> Iterator[tuple[str, str]]:
    """Yield (label, text): the jobs' common value, or the number of different values."""
    for label, *keys in _FACTS:
        if text := ", ".join(_fact(key, value) for key in keys if (value := _common(jobs, key))):
            yield label, text
    if (key := next((key for key in _DATA if _common(jobs, key)), None)) is not None:
        yield "data", _fact(key, _common(jobs, key))


def _run_facts(results: SweepResults) -> Iterator[tuple[str, str]]:
    """Yield (label, text) about all jobs' results."""
    jobs = results.sweep.jobs
    if steps := sorted({job.steps for job in jobs if job.status == OK and job.steps is not None}):
        yield "steps", f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    if seconds := [job.seconds for job in jobs if job.seconds is not None]:
        yield "time", f"{_duration(sum(seconds))} for all jobs, {_duration(sum(seconds) / len(seconds))} per job"
    yield "compared by", f"{results.sweep.metric} at the end, {results.better} is better"
    if device := _joined(job.device for job in jobs if job.device):
        yield "device", device
    names = dict.fromkeys(name for job in jobs for name in job.versions)
    if versions := [f"{name} {_joined(job.versions[name] for job in jobs if name in job.versions)}" for name in names]:
        yield "versions", ", ".join(versions)


def _common(jobs: Sequence[Job], key: str) -> str:
    values = list(dict.fromkeys(short(job.config[key]) for job in jobs if job.config.get(key) is not None))
    return values[0] if len(values) == 1 else f"{len(values)} different" if values else ""


def _fact(key: str, value: str) -> str:
    name = key.rpartition(".")[2]
    if name == "_target_":
        return value.rpartition(".")[2] if not value.endswith(".load") else value
    return value if key.startswith(("model", "data")) else f"{name.removeprefix('lora_')} {value}"


def _joined(values: Iterable[str]) -> str:
    return " / ".join(sorted(set(values)))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _reach_row(results: SweepResults, reach: Reach) -> dict[str, str]:
    """Return a row of the table about reaching ratio 1's final metric."""
    outcome = results.outcome
    # For equal steps, the times differ only by noise
    faster = None if reach.times_fewer_steps == 1 else reach.times_faster
    return {
        "setting": results.label(reach.setting),
        "role": "ratio 1" if reach is outcome.reached[0] else "best" if reach.setting is outcome.best else "",
        "step": "not reached" if reach.step is None else f"{reach.step:,}",
        "seconds": ABSENT if reach.seconds is None else _duration(reach.seconds),
        "fewer": ABSENT if reach.times_fewer_steps is None else f"{reach.times_fewer_steps:.2f}x",
        "faster": ABSENT if faster is None else f"{faster:.2f}x",
        "mean": with_spread(reach.setting.mean, reach.setting.spread),
    }


def _columns(results: SweepResults) -> list[dict[str, Any]]:
    """Return each column's heading, tooltip, and True if it has numbers."""
    columns = (
        ("job", "the job's folder", False),
        ("status", "the job's status", False),
        *((results.names[key], key, _numeric(results, key)) for key in results.keys),
        (results.sweep.metric, "at the end", True),
        ("best", "value at the job's best evaluation", True),
        ("steps", "number of optimizer steps", True),
        *((("left at step", "step at which the job left the search", True),) if results.sweep.pruned else ()),
        ("seconds", "seconds of the whole job", True),
        ("reason", "reason for a missing result, and files that can't be read", False),
    )
    return [{"name": name, "title": title, "number": is_number} for name, title, is_number in columns]


def _numeric(results: SweepResults, key: str) -> bool:
    values = [value_of(job, key) for job in results.sweep.jobs]
    return all(value is None or number(value) is not None for value in values)


def _row(results: SweepResults, job: Job) -> dict[str, Any]:
    """Return a job's row: each cell's text and its value for sorting."""
    cells: list[tuple[str, Any]] = [
        (job.folder, job.folder),
        (job.status, job.status),
        *((short(value), value) for value in (value_of(job, key) for key in results.keys)),
        (measured(job.value), job.value),
        (measured(job.best), job.best),
        (ABSENT if job.steps is None else f"{job.steps:,}", job.steps),
        *(((ABSENT if job.left_at is None else f"{job.left_at:,}", job.left_at),) if results.sweep.pruned else ()),
        (ABSENT if job.seconds is None else f"{job.seconds:,.1f}", job.seconds),
    ]
    reason = job.progress if job in results.sweep.in_progress else _reason(job)
    return {
        "status": job.status,
        "link": _link(job),
        "role": "best" if job is results.outcome.best_job else "",
        "cells": [{"text": text, "sort": "" if value is None else value} for text, value in cells],
        "reason": reason,
        "first_line": _first_line(reason),
        "folds": len(reason) > _LONGEST_LINE or "\n" in reason,
    }


def _left(results: SweepResults) -> list[tuple[int, list[Job]]]:
    """Return the steps at which jobs left a search, with these jobs. The first step comes first."""
    by_step: dict[int, list[Job]] = {}
    for job in sorted(results.sweep.pruned, key=lambda job: job.left_at or 0):
        by_step.setdefault(job.left_at or 0, []).append(job)
    return list(by_step.items())


def _troubles(results: SweepResults) -> list[tuple[str, str, list[Job]]]:
    """Return (status, reason, jobs) for each reason why jobs have no result."""
    by_reason: dict[tuple[str, str], list[Job]] = {}
    for job in results.sweep.unsuccessful:
        by_reason.setdefault((job.status, _reason(job)), []).append(job)
    return [(status, reason, jobs) for (status, reason), jobs in by_reason.items()]


def _link(job: Job) -> str:
    return f"./{quote(os.fsencode(job.folder), safe='')}/"


def _reason(job: Job) -> str:
    text = job.reason.strip()
    cut = len(text) - _LONGEST_REASON
    return text if cut <= 0 else f"{text[:_LONGEST_REASON]} … ({cut:,} characters more in the job's files)"


def _first_line(reason: str) -> str:
    line = (reason.splitlines() or [""])[0]
    if len(line) <= _LONGEST_LINE:
        return line
    start = line[:_LONGEST_LINE]
    return f"{start.rpartition(' ')[0] or start} …"
