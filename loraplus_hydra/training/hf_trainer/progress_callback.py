"""Show the HF Trainer's progress."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from loraplus_hydra.training.progress import ProgressDisplay

_LOSSES = ("loss", "eval_loss")


class ShowProgress(TrainerCallback):
    """Passes steps and losses to a ProgressDisplay."""

    def __init__(self, display: ProgressDisplay) -> None:
        self.display = display

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.display.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        losses = {name: float(value) for name, value in (logs or {}).items() if name in _LOSSES}
        if losses and state.is_world_process_zero:
            self.display.report(state.global_step, state.max_steps, losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.close()


def remove_own_printing(trainer: Any) -> None:
    """Remove the Trainer's own printing, which would write dicts between our lines."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
