"""The report of a sweep: results.csv, report.html and figures, from whatever files its jobs left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.files import remove, write_bytes, write_text
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.report import figures
from loraplus_hydra.report.figures import style
from loraplus_hydra.report.page import PageFigure, page
from loraplus_hydra.report.read_sweep import Job
from loraplus_hydra.report.results import SweepResults, results_of
from loraplus_hydra.report.table import csv_text

CSV, PAGE = "results.csv", "report.html"
_PATIENCE = 60.0  # seconds to wait for another process that writes the same report


@dataclass(frozen=True)
class SweepReport:
    """A written report and its content."""

    folder: Path
    results: SweepResults
    files: tuple[str, ...]  # names in `folder`

    @property
    def unsuccessful(self) -> tuple[Job, ...]:
        """Jobs without a result: failed, interrupted, pruned, unfinished or broken."""
        return self.results.sweep.unsuccessful


def write_report(folder: Path) -> SweepReport:
    """Read the jobs in `folder` and write results.csv, figures and report.html there, each atomically.

    A figure of an earlier report that no longer suits the sweep is removed. Raises UserError if there is no job.
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
        drawn = _write(folder, results)
    return SweepReport(folder, results, (PAGE, CSV, *(f"{figure.name}.png" for figure in drawn)))


def _write(folder: Path, results: SweepResults) -> list[PageFigure]:
    write_text(folder / CSV, csv_text(results))  # first, so that an error in a figure leaves the numbers
    drawn = _write_figures(folder, results)
    write_text(folder / PAGE, page(results, drawn))
    return drawn


def _write_figures(folder: Path, results: SweepResults) -> list[PageFigure]:
    drawn = []
    with style.house_style():
        for picture in figures.draw_all(results):
            interrupts.stop_if_asked()
            write_bytes(folder / f"{picture.name}.png", style.png(picture.figure))
            svg = style.svg(picture.figure, picture.title)
            drawn.append(PageFigure(picture.name, picture.title, picture.caption, svg))
    for name in set(figures.NAMES) - {figure.name for figure in drawn}:
        remove(folder / f"{name}.png")
    return drawn
