"""Signals that stop the program, kept as a flag until a place where it can stop.

An exception raised by a handler is lost when it comes inside a garbage collection or a `__del__`, and leaves half-done
work when it comes inside a save. So the handler only sets a flag. `stop_if_asked` raises where stopping is safe.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: a scheduler's warning ahead of the time limit
_FIRST_NOTICE = "the present part is finished first"


class Interrupted(KeyboardInterrupt):
    """The end of the program by a signal."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


@dataclass
class _State:
    number: int = 0  # the first signal that came; 0 = none
    kept: bool = False  # True while the handlers are installed
    at_once: bool = False  # True where no code of ours runs that could see the flag
    notice: str = _FIRST_NOTICE


_state = _State()


def requested() -> int:
    """Return the number of the signal that asked to stop, 0 for none."""
    return _state.number


def request(number: int) -> None:
    """Ask to stop, for a signal that another process received."""
    _state.number = _state.number or number


def stop_if_asked() -> None:
    """Raise Interrupted if a signal asked to stop."""
    if _state.number:
        raise Interrupted(_state.number)


def status_of(error: KeyboardInterrupt) -> int:
    """Return the exit status of a program that `error` ends, as shells count it."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def raise_at_once(now: bool) -> None:
    """Let a first signal raise at once while the program only waits for its workers."""
    _state.at_once = now


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Inside, print `text` when a signal comes: what is done before the program stops."""
    before, _state.notice = _state.notice, text
    try:
        yield
    finally:
        _state.notice = before


@contextmanager
def kept_signals(*, deliver: bool = True) -> Iterator[None]:
    """Inside, keep signals as a flag; a second one raises Interrupted at once.

    At the end a signal that came has its usual effect, by the handlers from before, unless `deliver` is False.
    """
    if _state.kept or threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield
        return
    handlers = ((number, signal.getsignal(number)) for number in SIGNALS)
    # An ignored signal stays ignored, as under nohup; None is a handler that isn't Python's.
    before = {number: handler for number, handler in handlers if handler not in (signal.SIG_IGN, None)}
    _state.number, _state.kept, _state.at_once = 0, True, False
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        came, _state.kept, _state.at_once = _state.number, False, False
        if deliver and came:
            _state.number = 0
            _deliver(came, before[signal.Signals(came)])


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.number or _state.at_once:
        request(number)
        raise Interrupted(_state.number)
    _state.number = number
    with suppress(OSError):  # not print(): it fails inside a print that the signal interrupts
        os.write(2, f"\nStopping: {_state.notice}; once more to stop at once\n".encode())


def _deliver(number: int, handler: Callable[[int, FrameType | None], Any] | int | None) -> None:
    if callable(handler):
        handler(number, None)
        raise Interrupted(number)  # a handler of the caller's own may return
    os.kill(os.getpid(), number)


def _forget_in_child() -> None:
    """Let SIGTERM end a forked worker, as the pools of other libraries expect."""
    if _state.kept:
        _state.kept, _state.number = False, 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
