"""Write the HF Trainer's log to metrics.jsonl."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from loraplus_hydra.io.metrics_log import MetricsLog
from loraplus_hydra.training.step_norms import Norms, StepNorms, can_be_seen, may_be_logged


class MetricsCallback(TrainerCallback):
    """Passes each logged step and evaluation to a MetricsLog.

    The Trainer's own log has the first group's rate only, and the one of the next step. So the rates of all groups are
    noted before each step.
    """

    def __init__(self, log: MetricsLog) -> None:
        self.log = log
        self.rates: dict[str, float] = {}
        self.before: StepNorms | None = None
        self.norms: Norms | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = {group["name"]: float(group["lr"]) for group in kwargs["optimizer"].param_groups}
        self.norms = None
        if can_be_seen(args) and may_be_logged(args, state, kwargs.get("train_dataloader")):
            self.before = StepNorms(kwargs["optimizer"], kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before is not None:
            self.norms, self.before = self.before.norms(), None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = dict(logs or {})
        if not state.is_world_process_zero or "train_runtime" in values:  # the final summary belongs to result.json
            return
        of_training = values.pop("learning_rate", None) is not None
        self.log.write(
            state.global_step,
            values,
            rates=self.rates if of_training else None,
            norms=self.norms if of_training else None,
        )
