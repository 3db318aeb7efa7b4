"""Progress of training: a bar on a terminal, otherwise a line per logged step."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("loraplus_hydra")


class ProgressDisplay:
    """Shows the number of steps done, with the newest losses."""

    def __init__(self, *, bar: bool) -> None:
        self.bar = Progress(
            TextColumn("    training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            disable=not bar,
        )
        self.task = self.bar.add_task("")
        self.newest: dict[str, float] = {}

    def begin(self, step: int, total: int) -> None:
        """Show that `step` of `total` steps are done."""
        self.bar.reset(self.task, total=total, completed=step)
        self.bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.update(self.task, completed=step)

    def report(self, step: int, total: int, losses: Mapping[str, float]) -> None:
        """Show losses that were logged at `step`."""
        self.newest.update(losses)
        if self.bar.live.is_started:
            self.bar.update(self.task, description=_as_text(self.newest))
        elif total:
            log.info("    step %d of %d: %s", step, total, _as_text(losses))

    def close(self) -> None:
        """Release the terminal. A second call changes nothing."""
        self.bar.stop()


def _as_text(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
