"""The report of a sweep: results.csv, report.html and figures, from whatever files its jobs left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.files import remove, write_bytes, write_text
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.report import figures
from loraplus_hydra.report.figures import style
from loraplus_hydra.report.page import page
from loraplus_hydra.report.results import SweepResults, results_of
from loraplus_hydra.report.table import csv_text

CSV, PAGE = "results.csv", "report.html"
_PATIENCE = 60.0  # seconds to wait for another process that writes the same report


def write_report(folder: Path) -> SweepResults:
    """Read the jobs in `folder` and write results.csv, figures and report.html there, each atomically.

    A figure of an earlier report that no longer suits the sweep is removed. Returns what the report shows. Raises
    UserError if there is no job.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a sweep's folder, as in report outputs/sweeps/NAME")
    results = results_of(folder)
    if not results.sweep.jobs:
        raise UserError(
            f"{folder} holds no job: none of its sub-folders has a result.json, config.yaml, metrics.jsonl or .hydra; "
            "name a sweep's folder, not a run's"
        )
    with folder_lock(folder, use="another report is being written", key="folder", patience=_PATIENCE):
        write_text(folder / CSV, csv_text(results))  # first, so that an error in a figure leaves the numbers
        write_text(folder / PAGE, page(results, _write_figures(folder, results)))
    return results


def _write_figures(folder: Path, results: SweepResults) -> list[style.Picture]:
    drawn = []
    with matplotlib.rc_context(style.SETTINGS):
        for picture in figures.draw_all(results):
            interrupts.stop_if_asked()
            write_bytes(folder / f"{picture.name}.png", style.png(picture.figure))
            drawn.append(replace(picture, svg=style.svg(picture.figure, picture.title)))
    for name in set(figures.NAMES) - {figure.name for figure in drawn}:
        remove(folder / f"{name}.png")
    return drawn
