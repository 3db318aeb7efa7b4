"""Ctrl-C and SIGTERM in training: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loraplus_hydra.io import screen

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A signal's request to stop training after the current step."""

    def __init__(self) -> None:
        self.signal = 0  # the signal's number; 0 = no request
        self.training = False  # False during the evaluation before the first step, where there is no step to finish


@contextmanager
def stop_requested_by_signals(request: StopRequest) -> Iterator[None]:
    """Inside, make a first signal a request to stop, and let a second one end training at once.

    On exit, a signal that was turned into a request has its usual effect: KeyboardInterrupt for Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if not request.training or request.signal:
            before[number](number, frame)
        else:
            request.signal = number
            screen.show("    Stopping: this step is finished and a checkpoint written; once more to stop at once")

    for number in map(int, SIGNALS):
        handler = signal.getsignal(number)
        if callable(handler):  # an ignored signal stays ignored
            before[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.signal:
        before.get(request.signal, signal.default_int_handler)(request.signal, None)
