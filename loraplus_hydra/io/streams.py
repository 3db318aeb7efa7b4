"""Standard output and error that don't end the program when writing fails.

Writing can fail in several ways: `| head` stops reading, a terminal is closed, a device is full, or the program was
started with `>&-`. A run's results are in files, so the run continues without a screen.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


class _LastingFile(io.FileIO):
    """A file descriptor that ignores failed writes."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None  # error of the first failed write

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except BlockingIOError:
                raise
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


def make_streams_last() -> None:
    """Make this program's stdout and stderr ignore failed writes."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def lost_output() -> str:
    """Return the error of a failed write to stdout.

    Empty if all output was written, or if the reader closed the pipe.
    """
    error = _write_error()
    return "" if error is None or error.errno == errno.EPIPE else str(error.strerror)


def is_read() -> bool:
    """Return False if a write to stdout has failed, for example because the reader closed the pipe."""
    return _write_error() is None


def _write_error() -> OSError | None:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _LastingFile) else None


def _lasting(stream: IO[str] | None) -> IO[str]:
    if stream is None:  # started with >&-: otherwise the next opened file would get this descriptor
        return Path(os.devnull).open("w", encoding="utf-8")
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream  # replaced by the calling program
    with suppress(OSError):
        stream.flush()
    buffer = io.BufferedWriter(_LastingFile(stream.fileno()))
    # PYTHONUNBUFFERED, which is usual in containers, sets write_through
    by_line = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=by_line)
