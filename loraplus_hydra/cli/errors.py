"""Errors on the screen, and exit statuses: 0, 1, or 128 + the signal's number."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from loraplus_hydra.errors import ConfigErrors, UserError
from loraplus_hydra.io import processes, screen
from loraplus_hydra.io.text import presentable

EXIT_USER_ERROR = 1
_SHOW_TRACEBACK = "LORAPLUS_HYDRA_TRACEBACK"


def take_over_full_error() -> None:
    """Make Hydra pass on every error, and store whether the user wants tracebacks."""
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        os.environ[_SHOW_TRACEBACK] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"


def wants_traceback() -> bool:
    """Return True if the user has set HYDRA_FULL_ERROR."""
    return bool(os.environ.get(_SHOW_TRACEBACK))


def print_error(error: Exception) -> None:
    """Print an error without its traceback. In a distributed run only the first process prints."""
    if not processes.is_main() and isinstance(error, UserError):
        return
    if isinstance(error, ConfigErrors):
        count = len(error.problems)
        lines = [f"{count} error{'s' if count > 1 else ''}:", *(f"  - {each}" for each in error.problems)]
    elif isinstance(error, UserError):
        lines = [f"Error: {error}"]
    else:
        hint = "For the traceback, set the environment variable HYDRA_FULL_ERROR=1."
        lines = [f"{type(error).__name__}: {error}", hint]
    print(presentable("\n".join(lines)), file=sys.stderr)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print and log an error that the block raises, and raise SystemExit with status 1."""
    try:
        yield
    except Exception as error:
        is_expected = isinstance(error, UserError)
        text = f"Error: {error}" if is_expected else "".join(traceback.format_exception(error))
        screen.log_to_file(text, logging.ERROR)
        if wants_traceback() and not is_expected:
            traceback.print_exception(error)
        else:
            print_error(error)
        raise SystemExit(EXIT_USER_ERROR) from error
