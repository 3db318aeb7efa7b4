"""The report of a sweep: results.csv, report.html and the figures, made from whatever its jobs left on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.files import unfinished, write_text
from loraplus_hydra.report.read_sweep import Job
from loraplus_hydra.report.results import SweepResults, results_of

CSV, PAGE = "results.csv", "report.html"


@dataclass(frozen=True)
class SweepReport:
    """What was written, and what `terminal.show` shows of it."""

    folder: Path
    results: SweepResults
    files: tuple[str, ...]  # names in `folder`

    @property
    def unsuccessful(self) -> tuple[Job, ...]:
        """Jobs without a result: failed, interrupted, pruned, unfinished or broken."""
        return self.results.sweep.unsuccessful


def write_report(folder: Path) -> SweepReport:
    """Read the jobs in `folder` and write results.csv, figures and report.html there, each whole or not at all.

    The table comes first and the page last, so that whatever stops the writing leaves the numbers. A figure of an
    earlier report that no longer suits the sweep is taken away. Raises UserError where there is no job.
    """
    from loraplus_hydra.report import figures
    from loraplus_hydra.report.figures import style
    from loraplus_hydra.report.page import Shown, page
    from loraplus_hydra.report.table import csv_text

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a sweep's folder, as in report outputs/sweeps/NAME")
    results = results_of(folder)
    if not results.sweep.jobs:
        raise UserError(
            f"{folder} holds no job: none of its sub-folders has a result.json, a config.yaml, a metrics.jsonl or a "
            ".hydra folder; name a sweep's folder, not a run's"
        )
    write_text(folder / CSV, csv_text(results))
    shown = []
    with style.house_style():
        for picture in figures.draw_all(results):
            _write_bytes(folder / f"{picture.name}.png", style.png(picture.figure))
            svg = style.svg(picture.figure, picture.title)
            shown.append(Shown(picture.name, picture.title, picture.caption, svg))
    drawn = [picture.name for picture in shown]
    for name in figures.NAMES:
        if name not in drawn:
            (folder / f"{name}.png").unlink(missing_ok=True)
    write_text(folder / PAGE, page(results, shown))
    return SweepReport(folder, results, (PAGE, CSV, *(f"{name}.png" for name in drawn)))


def _write_bytes(path: Path, content: bytes) -> None:
    unfinished(path).write_bytes(content)
    unfinished(path).replace(path)
