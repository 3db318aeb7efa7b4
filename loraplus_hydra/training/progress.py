"""Progress of training: a bar on a terminal, otherwise a line per logged step."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from loraplus_hydra.io.screen import time_left

log = logging.getLogger("loraplus_hydra")


@dataclass
class TimeLeft:
    """An estimate of a run's remaining seconds, from the mean durations of what it has done so far.

    `evaluate_every` and `save_every` are numbers of steps; None means only at the end.
    """

    steps: int
    evaluate_every: float | None = None
    save_every: float | None = None
    clock: Callable[[], float] = time.monotonic
    _mark: float = field(init=False)
    _durations: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mark = self.clock()

    def done(self, what: str) -> None:
        """Record that a `step`, an `evaluation` or a `save` has ended. It began at the end of what was before."""
        now = self.clock()
        self._durations.setdefault(what, []).append(now - self._mark)
        self._mark = now

    def seconds(self, step: int) -> float | None:
        """Return the estimate after `step`; None if no step was measured."""
        if not self._durations.get("step"):
            return None
        return (
            (self.steps - step) * self._mean("step")
            + times_left(step, self.steps, self.evaluate_every) * self._mean("evaluation")
            + times_left(step, self.steps, self.save_every) * self._mean("save")
        )

    def _mean(self, what: str) -> float:
        durations = self._durations.get(what, [])
        # The first one is longer: caches are filled, kernels are chosen
        durations = durations[1:] or durations
        return sum(durations) / len(durations) if durations else 0.0


def times_left(step: int, steps: int, every: float | None) -> int:
    """Return how often something happens after `step` that happens `every` so many steps and at the end."""
    if step >= steps:
        return 0
    if not every:
        return 1
    return int(steps // every) - int(step // every) + (1 if steps % every else 0)


class ProgressDisplay:
    """Shows the number of steps done, with the newest values, the speed, and the time left."""

    def __init__(self, *, bar: bool) -> None:
        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),  # all columns fit into 80 characters
            TextColumn("{task.description}"),
            disable=not bar,
        )
        self.task = self.bar.add_task("")
        self.newest: dict[str, float] = {}
        self.speed = ""
        self._handlers: list[logging.StreamHandler[Any]] = []  # those that write messages above the bar
        self._screen: Any = sys.stdout

    def begin(self, step: int, total: int) -> None:
        """Show that `step` of `total` steps are done."""
        self.bar.reset(self.task, total=total, completed=step)
        self._screen = sys.stdout
        self.bar.start()
        if sys.stdout is not self._screen:  # rich puts what is written there above the bar
            handlers = {*logging.getLogger().handlers, *log.handlers}
            self._handlers = [
                each for each in handlers if isinstance(each, logging.StreamHandler) and each.stream is self._screen
            ]
            for handler in self._handlers:
                handler.setStream(sys.stdout)

    def advance(self, step: int, left: float | None) -> None:
        """Move the bar to `step`. `left` is the number of seconds that are left, if known."""
        self.bar.update(self.task, completed=step, description=self._description(left))

    def evaluating(self, batch: int, batches: int | None) -> None:
        """Show that an evaluation has done `batch` of its `batches`."""
        of = "" if batches is None else f" of {batches}"
        self.bar.update(self.task, description=f"{_as_text(self.newest)}  evaluating {batch}{of}")

    def report(
        self, step: int, total: int, values: Mapping[str, float], speed: float | None, left: float | None
    ) -> None:
        """Show values that were logged at `step`, the tokens per second, and the seconds that are left."""
        self.newest.update(values)
        self.speed = self.speed if speed is None else f"  {_short(speed)} tokens/s"
        if self.bar.live.is_started:
            self.bar.update(self.task, description=self._description(left))
        elif total:
            rest = f"{'' if speed is None else self.speed}{_left(left)}"
            log.info("    step %d of %d: %s%s", step, total, _as_text(values), rest)

    def close(self) -> None:
        """Release the terminal. A second call changes nothing."""
        for handler in self._handlers:
            handler.setStream(self._screen)
        self._handlers = []
        self.bar.stop()

    def _description(self, left: float | None) -> str:
        return f"{_as_text(self.newest)}{self.speed}{_left(left)}"


def _as_text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def _left(seconds: float | None) -> str:
    return "" if seconds is None else time_left(seconds)


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
