"""report.html: one page without a network, made from a template whose every value is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplus_hydra.io.result import OK
from loraplus_hydra.report import summary
from loraplus_hydra.report.formatting import ABSENT, count, measured, short, with_spread
from loraplus_hydra.report.read_sweep import Job
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import value_of
from loraplus_hydra.report.table import in_order
from loraplus_hydra.report.values import number

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_CHARACTERS = 120  # of a reason before it folds
_MOST_KEPT = 4000  # of a reason at all


@dataclass(frozen=True)
class Shown:
    """A figure on the page."""

    name: str
    title: str
    caption: str
    svg: str


def page(results: SweepResults, figures: Sequence[Shown]) -> str:
    """The whole page as HTML.

    Its Content-Security-Policy allows neither a request nor any script but its own, whatever a job's texts hold.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "table.js.jinja").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template("page.html.jinja").render(
        title=results.sweep.name,
        results=results,
        outcome=results.outcome,
        style=Markup((_TEMPLATES / "style.css.jinja").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        summary=_summary(results),
        facts=list(_facts(results)),
        headline=summary.headline(results),
        details=summary.details(results),
        speed=summary.speed_sentence(results),
        best_command=summary.command(results),
        reached=_reached(results),
        figures=[{**vars(one), "svg": Markup(one.svg)} for one in figures],
        columns=_columns(results),
        rows=[_row(results, job) for job in in_order(results)],
        statuses=sorted({job.status for job in results.sweep.jobs}),
        unsuccessful=results.sweep.unsuccessful,
        count=count,
        first_line=_first_line,
    )


def _summary(results: SweepResults) -> str:
    jobs = results.sweep.jobs
    well = sum(job.counts for job in jobs)
    varied = ", ".join(results.names[key] for key in results.keys)
    return f"{count(len(jobs), 'job')}, {well} with a result" + (f"; varied: {varied}." if varied else ".")


def _facts(results: SweepResults) -> Iterator[tuple[str, str]]:
    """What was run, as pairs of a word and a value; what differs between jobs is told by its number of values."""
    jobs = results.sweep.jobs
    for word, *keys in (
        ("model", "model.path"),
        ("adapter", "adapter._target_", "adapter.r", "adapter.lora_alpha"),
        ("optimizer", "optimizer._target_"),
        ("schedule", "scheduler._target_"),
        ("task", "task._target_"),
        ("data", "data.name", "data.path", "data.train", "data._target_"),
    ):
        told = [(key, _common(jobs, key)) for key in keys]
        if word == "data":
            told = [one for one in told if one[1]][:1]
        text = ", ".join(_fact(key, value) for key, value in told if value)
        if text:
            yield word, text
    steps = sorted({job.steps for job in jobs if job.status == OK and job.steps is not None})
    if steps:
        yield "steps", f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    clock = [job.seconds for job in jobs if job.seconds is not None]
    if clock:
        yield "time", f"{_duration(sum(clock))} for all jobs, {_duration(sum(clock) / len(clock))} each"
    yield "compared by", f"{results.sweep.metric} at the end, {results.better} is better"
    if device := _only(job.device for job in jobs if job.device):
        yield "device", device
    versions: dict[str, set[str]] = {}
    for job in jobs:
        for name, version in job.versions.items():
            versions.setdefault(name, set()).add(version)
    if versions:
        yield "versions", ", ".join(f"{name} {' / '.join(sorted(found))}" for name, found in versions.items())


def _common(jobs: Sequence[Job], key: str) -> str:
    values = list(dict.fromkeys(short(job.config[key]) for job in jobs if job.config.get(key) is not None))
    return values[0] if len(values) == 1 else f"{len(values)} different" if values else ""


def _fact(key: str, value: str) -> str:
    name = key.rpartition(".")[2]
    if name == "_target_":
        return value.rpartition(".")[2] if not value.endswith(".load") else value
    return value if key.startswith(("model", "data")) else f"{name.removeprefix('lora_')} {value}"


def _only(values: Any) -> str:
    return " / ".join(sorted(set(values)))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _reached(results: SweepResults) -> list[dict[str, str]]:
    """The rows of the table of steps and seconds to ratio 1's last loss."""
    return [
        {
            "setting": results.label(one.setting),
            "role": "ratio 1" if place == 0 else "best" if one.setting is results.outcome.best else "",
            "step": "not reached" if one.step is None else f"{one.step:,}",
            "seconds": ABSENT if one.seconds is None else _duration(one.seconds),
            "fewer": ABSENT if one.times_fewer_steps is None else f"{one.times_fewer_steps:.2f}x",
            # At equal steps the clock tells of start-up noise alone.
            "faster": ABSENT if one.times_faster is None or one.times_fewer_steps == 1 else f"{one.times_faster:.2f}x",
            "mean": with_spread(one.setting.mean, one.setting.spread),
        }
        for place, one in enumerate(results.outcome.reached)
    ]


def _columns(results: SweepResults) -> list[dict[str, Any]]:
    keys = [{"name": results.names[key], "title": key, "number": _numeric(results, key)} for key in results.keys]
    after = [(results.sweep.metric, "at the end"), ("best", "at the job's best evaluation"), ("steps", "taken")]
    return [
        {"name": "job", "title": "its folder", "number": False},
        {"name": "status", "title": "how it ended", "number": False},
        *keys,
        *({"name": name, "title": title, "number": True} for name, title in after),
        {"name": "seconds", "title": "of the whole job", "number": True},
        {"name": "reason", "title": "why it has no result, or what couldn't be read", "number": False},
    ]


def _numeric(results: SweepResults, key: str) -> bool:
    values = [value_of(job, key) for job in results.sweep.jobs]
    return all(value is None or number(value) is not None for value in values)


def _row(results: SweepResults, job: Job) -> dict[str, Any]:
    """A job's cells: what is shown, and what it is sorted by."""
    values = [value_of(job, key) for key in results.keys]
    reason = job.reason[:_MOST_KEPT]
    cells = [
        (job.folder, job.folder),
        (job.status, job.status),
        *((short(value), "" if value is None else value) for value in values),
        (measured(job.value), "" if job.value is None else job.value),
        (measured(job.best), "" if job.best is None else job.best),
        (ABSENT if job.steps is None else f"{job.steps:,}", "" if job.steps is None else job.steps),
        (ABSENT if job.seconds is None else f"{job.seconds:,.1f}", "" if job.seconds is None else job.seconds),
    ]
    return {
        "status": job.status,
        "role": "best" if job is results.outcome.best_job else "",
        "cells": [{"text": text, "sort": sort} for text, sort in cells],
        "reason": reason,
        "first_line": _first_line(reason),
        "folds": len(reason) > _MOST_CHARACTERS or "\n" in reason.strip(),
    }


def _first_line(reason: str) -> str:
    line = (reason.strip().splitlines() or [""])[0]
    return line if len(line) <= _MOST_CHARACTERS else line[:_MOST_CHARACTERS] + " …"
