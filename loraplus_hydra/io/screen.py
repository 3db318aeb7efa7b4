"""What a person sees of a run: the config as a tree, the groups as a table, progress, the result.

Plain lines when the output isn't a terminal. Everything said here is also in the run's log file, but for the progress
bar, whose numbers are in metrics.jsonl. Of a sweep the screen has tree and table once, for its first job, and a line
for how each job ended; the jobs' log files have it all.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from loraplus_hydra.io import processes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


log = logging.getLogger("loraplus_hydra")


def show(text: str) -> None:
    """One line on the screen and in the log file, from the run's first process alone."""
    if processes.is_main():
        log.info(text)


def log_to_file(text: str, level: int = logging.INFO) -> None:
    """What the log file alone has, if there is one."""
    fields = {"name": log.name, "levelno": level, "levelname": logging.getLevelName(level)}
    record = logging.makeLogRecord({**fields, "msg": "%s", "args": (text,)})
    for handler in logging.getLogger().handlers:  # not through the loggers, which have the screen for a handler too
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def print_rich(*renderables: Any, on_screen: bool = True) -> None:
    """On the screen as it is, and in the log file, if there is one, as plain text."""
    import io

    from rich.console import Console

    if on_screen:
        console().print(*renderables, sep="\n")
    text = io.StringIO()
    Console(file=text, width=160, no_color=True).print(*renderables, sep="\n")
    log_to_file(f"\n{text.getvalue()}")


def console() -> Console:
    """A console on the present stdout; wide enough for the tables where there is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = (), lines: bool = False
) -> Table:
    """A table of texts as they are, never read as markup; the columns in `right` are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.ROUNDED if sys.stdout.isatty() else box.ASCII2, show_lines=lines)
    for name in columns:
        made.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made
