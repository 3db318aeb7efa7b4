"""The files of a sweep's report: results.csv, report.html and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.files import remove, write_bytes, write_text
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.text import csv_cell, presentable
from loraplus_hydra.report import figures
from loraplus_hydra.report.figures import style
from loraplus_hydra.report.page import page
from loraplus_hydra.report.results import SweepResults, results_of
from loraplus_hydra.report.settings import value_of

CSV, PAGE = "results.csv", "report.html"
_PATIENCE = 60.0  # seconds to wait for another process that writes the same report


def write_report(folder: Path) -> SweepResults:
    """Read the jobs in `folder`, and write results.csv, figures and report.html into it.

    Each file is written atomically. Figures of an earlier report that no longer suit the sweep are removed. Returns the
    results in the report. Raises UserError if there is no job.
    """
    results = read_results(folder)
    if not results.sweep.jobs:
        raise UserError(
            f"{folder} has no job: none of its sub-folders has a result.json, config.yaml, metrics.jsonl or .hydra; "
            "give a sweep's folder, not a run's"
        )
    with _lock(folder):  # before the figures, because an error in a figure must not lose the numbers
        write_text(folder / CSV, csv_text(results))
    drawn = list(_draw(results))  # without the lock, because it takes seconds
    with _lock(folder):
        for picture in drawn:
            write_bytes(folder / f"{picture.name}.png", picture.png)
        for name in set(figures.NAMES) - {picture.name for picture in drawn}:
            remove(folder / f"{name}.png")
        write_text(folder / PAGE, page(results, drawn))
    return results


def read_results(folder: Path) -> SweepResults:
    """Read and compare the sweep in `folder`. Raises UserError if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a sweep's folder, for example: report outputs/sweeps/NAME")
    return results_of(folder)


def write_live_page(folder: Path, results: SweepResults) -> None:
    """Write report.html alone, as a page that browsers load again.

    It takes no lock, so a sweep that ends meanwhile does not wait with its own report.
    """
    write_text(folder / PAGE, page(results, list(_draw(results, png=False)), live=True))


def _lock(folder: Path) -> AbstractContextManager[bool]:
    return folder_lock(folder, use="another report is being written", key="folder", patience=_PATIENCE)


def _draw(results: SweepResults, *, png: bool = True) -> Iterator[style.Picture]:
    """Yield each figure as SVG, and as PNG if asked."""
    with matplotlib.rc_context(style.SETTINGS):
        for wide, narrow in zip(figures.draw_all(results), figures.draw_all(results, narrow=True), strict=True):
            interrupts.stop_if_asked()
            narrow_svg, svg = style.svg(narrow.figure, wide.title, "narrow"), style.svg(wide.figure, wide.title, "wide")
            wide.figure.set_layout_engine("none")  # the layout takes half of the time, and is the same for the PNG
            yield replace(wide, svg=svg, narrow_svg=narrow_svg, png=style.png(wide.figure) if png else b"")


def csv_text(results: SweepResults) -> str:
    """Return results.csv.

    Its columns: folder, status, each varied key in full, the metric under its name, best, steps, seconds, error. In a
    halved sweep, `steps` of a pruned job is the step at which it left.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["folder", "status", *results.keys, results.sweep.metric, "best", "steps", "seconds", "error"]
    writer.writerow(map(_cell, header))
    for job in results.jobs_best_first:
        values = [value_of(job, key) for key in results.keys]
        row: Sequence[Any] = [job.folder, job.status, *values, job.value, job.best, job.steps, job.seconds, job.reason]
        writer.writerow(map(_cell, row))
    return out.getvalue()


def _cell(value: Any) -> Any:
    return csv_cell(presentable(value)) if isinstance(value, str) else value
