"""Signals that stop the program, stored as a flag until the program can stop.

If a handler raises an exception inside a garbage collection or a `__del__`, the exception is lost. Inside a save, it
would leave incomplete files. So the handler only sets a flag, and `stop_if_asked` raises Interrupted at places where
stopping is safe.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: a scheduler's warning ahead of the time limit
_FIRST_NOTICE = "the current part is finished first"
_AGAIN_AFTER = 0.05  # seconds before a signal is repeated, after Python dropped its exception


class Interrupted(KeyboardInterrupt):
    """The end of the program by a signal."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


@dataclass
class _State:
    number: int = 0  # the first signal that was received; 0 = none
    kept: bool = False  # True while the handlers are installed
    at_once: bool = False  # True while no code of this program runs that could check the flag
    notice: str = _FIRST_NOTICE


_state = _State()


def requested() -> int:
    """Return the number of the signal that requested a stop; 0 for none."""
    return _state.number


def request(number: int) -> None:
    """Request a stop, for a signal that another process received."""
    _state.number = _state.number or number


def forget() -> None:
    """Withdraw the request, after the program has answered it."""
    _state.number = 0


def stop_if_asked() -> None:
    """Raise Interrupted if a stop was requested."""
    if _state.number:
        raise Interrupted(_state.number)


def status_of(error: KeyboardInterrupt) -> int:
    """Return the exit status, as in a shell, of a program that `error` ends."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def raise_at_once(now: bool) -> None:
    """Set whether the first signal raises at once. True suits a program that only waits for workers."""
    _state.at_once = now


@contextmanager
def answered() -> Iterator[None]:
    """Let the block finish although a signal was received. Another signal stops it at once."""
    came, _state.number, _state.at_once = _state.number, 0, False
    try:
        yield
    finally:
        _state.number = came or _state.number


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Print `text` if a signal is received inside the block.

    The text says what the program does before it stops.
    """
    before, _state.notice = _state.notice, text
    try:
        yield
    finally:
        _state.notice = before


@contextmanager
def kept_signals(*, deliver: bool = True) -> Iterator[None]:
    """Let a signal only set a flag inside the block. A second signal raises Interrupted at once.

    When the block ends, a stored signal is passed to the previous handlers, unless `deliver` is False.
    """
    # Python handles signals only in the main thread.
    if _state.kept or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = ((number, signal.getsignal(number)) for number in SIGNALS)
    # An ignored signal stays ignored, as under nohup. None means that the handler is not Python's.
    before = {number: handler for number, handler in handlers if handler not in (signal.SIG_IGN, None)}
    _state.number, _state.kept, _state.at_once = 0, True, False
    for number in before:
        signal.signal(number, _handle)
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_send_again, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
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
    with suppress(OSError):  # print() would fail if the signal interrupts another print()
        os.write(2, f"\nStopping: {_state.notice}; send the signal again to stop at once\n".encode())


def _send_again(hook: Callable[[sys.UnraisableHookArgs], Any], dropped: sys.UnraisableHookArgs) -> None:
    """Repeat a signal whose exception Python dropped in a garbage collection or a `__del__`."""
    if not isinstance(dropped.exc_value, Interrupted):
        hook(dropped)
        return

    def send(number: int = dropped.exc_value.number) -> None:
        if _state.kept and _state.at_once:  # without at_once, the flag is enough
            os.kill(os.getpid(), number)

    # Not called directly, because an exception inside this hook would be dropped again.
    timer = threading.Timer(_AGAIN_AFTER, send)
    timer.daemon = True
    timer.start()


def _deliver(number: int, handler: Callable[[int, FrameType | None], Any] | int | None) -> None:
    if callable(handler):
        handler(number, None)
        raise Interrupted(number)  # the caller's own handler may return
    os.kill(os.getpid(), number)


def _forget_in_child() -> None:
    """Let SIGTERM end a forked worker, because other libraries' pools expect that."""
    if _state.kept:
        _state.kept, _state.number = False, 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with suppress(ValueError):  # outside the main thread
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
