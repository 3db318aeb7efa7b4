"""results.csv: one row per job, in the order of the page's table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from loraplus_hydra.io.text import csv_cell
from loraplus_hydra.report.read_sweep import Job
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import value_of


def csv_text(results: SweepResults) -> str:
    """Return results.csv.

    The columns are folder, status, each varied key, the metric, best, steps, seconds and error.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["folder", "status", *results.keys, results.sweep.metric, "best", "steps", "seconds", "error"]
    writer.writerow(map(_cell, header))
    for job in in_order(results):
        values = [value_of(job, key) for key in results.keys]
        row: Sequence[Any] = [job.folder, job.status, *values, job.value, job.best, job.steps, job.seconds, job.reason]
        writer.writerow(map(_cell, row))
    return out.getvalue()


def _cell(value: Any) -> Any:
    return csv_cell(value) if isinstance(value, str) else value


def in_order(results: SweepResults) -> list[Job]:
    """Return the jobs. The best comes first, and jobs without a result come last."""
    sign = -1 if results.sweep.greater_is_better else 1
    successful = [job for job in results.sweep.jobs if job.has_result]
    successful.sort(key=lambda job: sign * (job.value or 0.0))
    return [*successful, *results.sweep.unsuccessful]
