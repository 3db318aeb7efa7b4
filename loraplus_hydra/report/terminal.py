"""The report on the screen: settings in order, jobs without a result with their reason, the best job's command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplus_hydra import screen
from loraplus_hydra.report import sentences
from loraplus_hydra.report.results_of import SweepResults
from loraplus_hydra.report.sweep import PAGE, SweepReport
from loraplus_hydra.report.wording import ABSENT, count, short, with_spread

if TYPE_CHECKING:
    from rich.table import Table

_MOST_KEYS = 6  # columns that a terminal has room for; the page has them all
_MOST_SETTINGS = 25
_MOST_CHARACTERS = 160  # of a reason


def show(report: SweepReport) -> None:
    """Print it. Texts of jobs are shown as they are, never read as markup."""
    results = report.results
    console = screen.console()
    if results.outcome.ranked:
        console.print(_settings(results))
        if (left := len(results.outcome.ranked) - _MOST_SETTINGS) > 0:
            console.print(f"... and {count(left, 'setting')} more in {PAGE}", markup=False)
    if report.unsuccessful:
        console.print(_without_result(report))
    for sentence in (*results.sweep.notes, sentences.headline(results), *sentences.details(results)):
        console.print(sentence, markup=False)
    if speed := sentences.speed_sentence(results):
        console.print(speed, markup=False)
    if command := sentences.command(results):
        console.print("The best job again:", markup=False)
        print(f"  {command}")  # unwrapped, to be copied
    print(f"The report lies in {report.folder / PAGE}")


def _settings(results: SweepResults) -> Table:
    keys = results.compared[:_MOST_KEYS]
    title = f"{results.sweep.metric}, {results.better} is better" + (
        ", mean ± standard deviation" if results.seeds else ""
    )
    table = _table(title, *(results.names[key] for key in keys), results.sweep.metric, "jobs", "best job", "")
    outcome = results.outcome
    for one in outcome.ranked[:_MOST_SETTINGS]:
        best_first = sorted(one.done, key=lambda job: job.value or 0.0, reverse=results.sweep.greater_is_better)
        done = f"{len(one.done)} of {len(one.jobs)}" if len(one.done) < len(one.jobs) else str(len(one.jobs))
        mark = "best" if one is outcome.best else "best at ratio 1" if one is outcome.baseline else ""
        values = [short(one.values.get(key)) for key in keys]
        _row(table, *values, with_spread(one.mean, one.spread), done, best_first[0].folder, mark)
    return table


def _without_result(report: SweepReport) -> Table:
    table = _table("Without a result", "job", "status", "reason")
    for job in report.unsuccessful:
        reason = " ".join(job.reason.split())
        if len(reason) > _MOST_CHARACTERS:
            reason = reason[:_MOST_CHARACTERS] + " ..."
        _row(table, job.folder, job.status, reason or ABSENT)
    return table


def _table(title: str, *columns: str) -> Table:
    import sys

    from rich import box
    from rich.table import Table
    from rich.text import Text

    style = box.ROUNDED if sys.stdout.isatty() else box.ASCII2
    table = Table(title=Text(title), title_justify="left", box=style)
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*map(Text, cells))
