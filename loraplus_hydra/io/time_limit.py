"""A time limit for patterns and templates from untrusted folders."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooSlowError(Exception):
    """The error when code takes longer than its time limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlowError if the block takes longer than `seconds`.

    There is no limit outside the main thread, because Python handles signals only there. The block must not change any
    state, because the error can be raised at any line.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"it takes longer than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    # Repeated each second, because the code may catch the first error
    remaining = signal.setitimer(signal.ITIMER_REAL, seconds, 1)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, handler)
