"""Callbacks that pass the Trainer's log to metrics.jsonl and to the screen."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from loraplus_hydra.io.metrics_log import MetricsLog
from loraplus_hydra.training.progress import ProgressDisplay
from loraplus_hydra.training.step_norms import Norms, StepNorms, may_be_logged

_LOSSES = ("loss", "eval_loss")


class MetricsCallback(TrainerCallback):
    """Passes each logged step and evaluation to a MetricsLog.

    The Trainer's own log has only the first group's rate, and it is the rate of the next step. So the rates of all
    groups are stored before each step.
    """

    def __init__(self, log: MetricsLog) -> None:
        self.log = log
        self.rates: dict[str, float] = {}
        self.before: StepNorms | None = None
        self.norms: Norms | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = {group["name"]: float(group["lr"]) for group in kwargs["optimizer"].param_groups}
        self.norms = None
        # DeepSpeed's engine takes its step elsewhere, on copies.
        if args.deepspeed_plugin is None and may_be_logged(args, state, kwargs.get("train_dataloader")):
            self.before = StepNorms(kwargs["optimizer"], kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before is not None:
            self.norms, self.before = self.before.norms(), None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = dict(logs or {})
        if not state.is_world_process_zero or "train_runtime" in values:  # the final summary is in result.json
            return
        of_training = values.pop("learning_rate", None) is not None
        self.log.write(
            state.global_step,
            values,
            rates=self.rates if of_training else None,
            norms=self.norms if of_training else None,
        )


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
    """Remove the Trainer's own printing of dicts."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
