"""The report in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from loraplus_hydra.io import screen
from loraplus_hydra.io.text import presentable
from loraplus_hydra.report import summary
from loraplus_hydra.report.formatting import ABSENT, count, short, with_spread
from loraplus_hydra.report.read_job import Job
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import value_of
from loraplus_hydra.report.write import PAGE

_MOST_KEYS = 6  # maximum number of columns; the page has all columns
_MOST_SETTINGS = 25
_MOST_CHARACTERS = 2000  # maximum number of characters of a reason


def show(results: SweepResults) -> None:
    """Print the report. Texts of jobs are never interpreted as markup."""
    console = screen.console()
    if results.outcome.ranked:
        spread = ", mean ± standard deviation" if results.seeds else ""
        console.print(presentable(f"{results.axis_label}{spread}"), markup=False)
        console.print(_settings(results))
        if (left := len(results.outcome.ranked) - _MOST_SETTINGS) > 0:
            console.print(f"... and {count(left, 'setting')} more in {PAGE}", markup=False)
    if results.sweep.in_progress:
        console.print("In progress")
        jobs = results.sweep.in_progress
        console.print(screen.table(("job", "status", "at"), [(job.folder, job.status, job.progress) for job in jobs]))
    if results.sweep.pruned:
        console.print("Left the search")
        console.print(_pruned(results))
    if results.sweep.unsuccessful:
        console.print("Without a result")
        console.print(_without_result(results.sweep.unsuccessful))
    sentences = (*results.sweep.notes, summary.headline(results), *summary.details(results))
    beyond, extending = summary.extension(results)
    for sentence in filter(None, (*sentences, summary.speed_sentence(results), *beyond)):
        console.print(presentable(sentence), markup=False)
    if command := summary.command(results):
        console.print("Run the best job again:", markup=False)
        print(presentable(f"  {command}"))  # not wrapped, because users copy the command
    if extending:
        console.print("Extend the sweep:", markup=False)
        print(presentable(f"  {extending}"))
    print(presentable(f"Report: {results.sweep.folder / PAGE}"))


def _settings(results: SweepResults) -> Table:
    keys = results.compared[:_MOST_KEYS]
    outcome = results.outcome
    cells = []
    for one in outcome.ranked[:_MOST_SETTINGS]:
        best_first = sorted(one.done, key=lambda job: job.value or 0.0, reverse=results.sweep.greater_is_better)
        done = f"{len(one.done)} of {len(one.jobs)}" if len(one.done) < len(one.jobs) else str(len(one.jobs))
        mark = "best" if one is outcome.best else "best at ratio 1" if one is outcome.baseline else ""
        values = [short(one.values.get(key)) for key in keys]
        cells.append((*values, with_spread(one.mean, one.spread), done, best_first[0].folder, mark))
    return screen.table([*(results.names[key] for key in keys), results.sweep.metric, "jobs", "best job", ""], cells)


def _pruned(results: SweepResults) -> Table:
    keys = results.keys[:_MOST_KEYS]
    jobs = results.sweep.pruned[:_MOST_SETTINGS]
    cells = [(*(short(value_of(job, key)) for key in keys), str(job.left_at or ABSENT), job.folder) for job in jobs]
    return screen.table([*(results.names[key] for key in keys), "left at step", "job"], cells)


def _without_result(jobs: Iterable[Job]) -> Table:
    cells = []
    for job in jobs:
        reason = job.reason.strip()
        if len(reason) > _MOST_CHARACTERS:
            reason = reason[:_MOST_CHARACTERS] + " ..."
        cells.append((job.folder, job.status, reason or ABSENT))
    return screen.table(("job", "status", "reason"), cells)
