"""Messages and tables on the screen and in the run's log file.

The output is plain text unless stdout is a terminal. The log file has everything that the screen shows, except the
progress bar, whose numbers are in metrics.jsonl. In a sweep the screen shows config and rates only for the first job,
and one line at the end of each job. The jobs' log files have everything.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraplus_hydra.io import processes
from loraplus_hydra.io.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

# rich is imported in the functions, because `--help` and a mistyped override need no tables.

log = logging.getLogger("loraplus_hydra")


def show(text: str) -> None:
    """Write a line to screen and log file. Only a run's first process writes."""
    if processes.is_main():
        log.info(text)


@contextmanager
def messages_on_stdout() -> Iterator[None]:
    """Print messages on stdout if logging is not set up, as in a notebook."""
    if log.level != logging.NOTSET or log.isEnabledFor(logging.INFO):  # logging is set up by Hydra or by the user
        yield
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    propagate = log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # a handler of the root logger would print each message again
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
        log.propagate = propagate


def log_to_file(text: str, level: int = logging.INFO) -> None:
    """Write `text` to the log file only, if there is one."""
    fields = {"name": log.name, "levelno": level, "levelname": logging.getLevelName(level)}
    record = logging.makeLogRecord({**fields, "msg": "%s", "args": (text,)})
    for handler in logging.getLogger().handlers:  # not through the loggers, because they also write to the screen
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def print_rich(*renderables: Any, on_screen: bool = True) -> None:
    """Print rich's renderables on the screen, and as plain text to the log file."""
    from rich.console import Console

    if on_screen:
        console().print(*renderables, sep="\n")
    text = io.StringIO()
    # In a notebook rich shows everything in the cell, whatever the file
    Console(file=text, width=160, no_color=True, force_jupyter=False).print(*renderables, sep="\n")
    log_to_file(f"\n{text.getvalue()}")


def console() -> Console:
    """Return a console for the current stdout."""
    from rich.console import Console

    # Without a terminal rich assumes 80 columns, which would wrap the tables.
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = (), lines: bool = False
) -> Table:
    """Return a table of texts; the columns in `right` are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.ROUNDED if sys.stdout.isatty() else box.ASCII2, show_lines=lines)
    for name in columns:  # as Text, because rich reads brackets in a name as markup
        made.add_column(Text(visible(name)), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(visible(cell)) for cell in row))
    return made


class RowProgress:
    """A bar with the number of rows done, rows per second, and the time left.

    It is shown on a terminal only, for more than one row. If the answers are printed there, too, it stays below them.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()
        self.file = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
        self.bar: Progress | None = None

    def __enter__(self) -> RowProgress:
        if self.file is not None and self.total > 1:
            self.bar = _bar(self.file, self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def print(self, text: str) -> None:
        """Print a line on stdout, above the bar."""
        if self.bar is not None and self.file is sys.stdout:
            # Written as it is: rich would wrap and colour it
            self.bar.console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)
        else:
            print(text, flush=True)

    def advance(self, rows: int = 1) -> None:
        """Record that more rows are done."""
        self.done += rows
        if self.bar is not None:
            speed = self.done / max(time.monotonic() - self.began, 1e-9)
            left = time_left((self.total - self.done) / speed)
            rows_text = f"{self.done:,} of {self.total:,} rows  {speed:.3g} rows/s{left}"
            self.bar.update(self.bar.task_ids[0], completed=self.done, description=rows_text)


def time_left(seconds: float) -> str:
    """Return ` M:SS left` or ` H:MM:SS left`, to be appended to other figures."""
    return f"  {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return seconds as M:SS or H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(file: Any, total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
    bar = Progress(*columns, console=Console(file=file), transient=True, redirect_stdout=False, redirect_stderr=False)
    bar.add_task(f"0 of {total:,} rows", total=total)
    return bar
