"""Messages and tables on the screen and in the run's log file.

The output is plain text unless stdout is a terminal. The log file has everything that the screen shows, except the
progress bar, whose numbers are in metrics.jsonl. In a sweep the screen shows config and rates only for the first job,
and one line at the end of each job. The jobs' log files have everything.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraplus_hydra.io import processes
from loraplus_hydra.io.text import visible

if TYPE_CHECKING:
    from rich.console import Console
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
    Console(file=text, width=160, no_color=True).print(*renderables, sep="\n")
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
