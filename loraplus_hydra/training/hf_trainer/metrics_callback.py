"""metrics.jsonl: a line for each logged step and each evaluation, complete also when the run was interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loraplus_hydra.training.step_norms import Norms, StepNorms, can_be_seen, may_be_logged


class MetricsWriter(TrainerCallback):
    """Appends a line to metrics.jsonl for each logged step and each evaluation.

    A training line: step, epoch, seconds since the start, loss, grad_norm and, in `lr`, the rate that each group had in
    that step (the Trainer's own log shows the first group's alone, and the rate of the step to come); in `norms` the
    norm of each group's weights behind the step, and of the step's change to them.
    """

    def __init__(
        self, path: Path, *, seconds: float = 0.0, tell: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.path = path
        self.started = time.perf_counter() - seconds  # a resumed run goes on counting
        self.tell = tell  # is given each line once it is written
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
        logs = dict(logs or {})
        if not state.is_world_process_zero or "train_runtime" in logs:  # the summary at the end is result.json's
            return
        line: dict[str, Any] = {"step": state.global_step, "seconds": round(time.perf_counter() - self.started, 3)}
        if logs.pop("learning_rate", None) is not None:
            line["lr"] = self.rates
            if self.norms is not None:
                line["norms"] = self.norms
        line.update(logs)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=True) + "\n")
        if self.tell is not None:
            self.tell(line)
