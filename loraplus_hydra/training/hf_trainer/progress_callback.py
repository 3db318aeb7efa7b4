"""Progress of a training run, as a Trainer callback."""

from __future__ import annotations

import logging
import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

log = logging.getLogger("loraplus_hydra")


class Progress(TrainerCallback):
    """A bar with the newest losses on a terminal; elsewhere a line for each logged step."""

    def __init__(self, bar: bool) -> None:
        self.bar = (
            Bar(
                TextColumn("    training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            if bar
            else None
        )
        self.task: Any = None
        self.newest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None and state.is_world_process_zero:
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shown = {name: float(value) for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        if not shown or not state.is_world_process_zero:
            return
        self.newest.update(shown)
        if self.bar is not None and self.task is not None:
            self.bar.update(
                self.task, description="  ".join(f"{key} {value:.4f}" for key, value in self.newest.items())
            )
        elif state.max_steps:
            text = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
            log.info("    step %d of %d: %s", state.global_step, state.max_steps, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; calling it again changes nothing."""
        if self.bar is not None:
            self.bar.stop()
        self.task = None


def progress() -> Any:
    """A Trainer callback that shows progress: a bar on a terminal, a line for each logged step elsewhere."""

    return Progress(bar=sys.stdout.isatty())


def keep_only_our_progress(trainer: Any) -> None:
    """Take the Trainer's own printing away: it would write dicts between our lines."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
