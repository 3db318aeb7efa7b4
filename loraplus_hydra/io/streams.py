"""Standard output and error that outlive their readers.

`| head` leaves early, a terminal is lost, a device is full, or the program was started with `>&-`. What a run computes
is in its files, so it continues without a screen.
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
    """A file descriptor whose failed writes are dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None  # of the first failed write

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
    """Let this program's stdout and stderr drop what they can't take."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def lost_output() -> str:
    """Return why stdout didn't take all output; empty if it did, or if its reader left."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _LastingFile) else None
    return "" if error is None or error.errno == errno.EPIPE else str(error.strerror)


def _lasting(stream: IO[str] | None) -> IO[str]:
    if stream is None:  # started with >&-; this takes the free descriptor, so that no other file gets it
        return Path(os.devnull).open("w", encoding="utf-8")
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream  # of a program around this one
    with suppress(OSError):
        stream.flush()
    buffer = io.BufferedWriter(_LastingFile(stream.fileno()))
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
