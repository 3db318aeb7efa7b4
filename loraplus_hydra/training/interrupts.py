"""Requests to stop training by Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loraplus_hydra.io import screen
from loraplus_hydra.training.hf_trainer.stop_at_step import StopAtStep

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finishing_the_step(stop: StopAtStep) -> Iterator[None]:
    """Inside, a first signal asks `stop` to end training; a second one ends it at once.

    On the way out a signal that was asked for takes the effect that it had before: KeyboardInterrupt for Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals there alone
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if not stop.training or stop.asked:
            before[number](number, frame)
        else:
            stop.asked = number
            screen.show("    Stopping: this step is finished and a checkpoint written; once more to stop at once")

    for number in map(int, SIGNALS):
        handler = signal.getsignal(number)
        if callable(handler):  # one that is ignored stays so
            before[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.asked:
        before.get(stop.asked, signal.default_int_handler)(stop.asked, None)
