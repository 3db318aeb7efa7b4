"""Callbacks that pass on the Trainer's log, and end training when a stop is requested."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import distributed
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy, has_length

from loraplus_hydra.io import interrupts, screen
from loraplus_hydra.io.metrics_log import MetricsLog
from loraplus_hydra.training.measure import Throughput, peak_memory_bytes
from loraplus_hydra.training.progress import ProgressDisplay, TimeLeft
from loraplus_hydra.training.step_norms import Norms, StepNorms, may_be_logged


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
        self.throughput = Throughput()
        self.began = 0.0  # the current step
        self.speed: float | None = None  # tokens per second, at the last line of training
        self.peak: float | None = None  # tokens per second and process at the device's peak, if known

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.seconds += time.perf_counter() - self.began

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = {group["name"]: float(group["lr"]) for group in kwargs["optimizer"].param_groups}
        self.norms = None
        # DeepSpeed's engine takes the step itself, on copies.
        if args.deepspeed_plugin is None and may_be_logged(args, state, kwargs.get("train_dataloader")):
            self.before = StepNorms(kwargs["optimizer"], kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in kwargs["optimizer"].param_groups:
            if "scheduled_lr" in group:  # a schedule-free optimizer has its own warm-up
                self.rates[group["name"]] = float(group["scheduled_lr"])
        if self.before is not None:
            self.norms, self.before = self.before.norms(), None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = dict(logs or {})
        if not state.is_world_process_zero or "train_runtime" in values:  # the final summary is in result.json
            return
        of_training = values.pop("learning_rate", None) is not None
        if of_training:
            values["memory_bytes"] = peak_memory_bytes(args.device)
            speed = self.throughput.take()
            if speed is not None:
                self.speed = speed * args.world_size  # the processes have batches of about the same size
                values["tokens_per_second"] = round(self.speed, 1)
                if self.peak is not None:
                    values["model_flops_utilisation"] = round(speed / self.peak, 4)
        self.log.write(
            state.global_step,
            values,
            rates=self.rates if of_training else None,
            norms=self.norms if of_training else None,
        )


class ShowProgress(TrainerCallback):
    """Passes steps, loss, task.metric, speed and the time left to a ProgressDisplay."""

    def __init__(self, display: ProgressDisplay, metrics: MetricsCallback) -> None:
        self.display = display
        self.metrics = metrics  # called before this callback
        self.time = TimeLeft(0)
        self.batch = 0  # of the current evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.time = TimeLeft(state.max_steps, *_intervals(args, state))
        if state.is_world_process_zero:
            self.display.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.time.done("step")
        self.display.advance(state.global_step, self.time.seconds(state.global_step))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows: Any = kwargs.get("eval_dataloader")
        batches = len(rows) if has_length(rows) else None
        self.batch = 1 if self.batch == batches else self.batch + 1  # an average is evaluated after the weights
        self.display.evaluating(self.batch, batches)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batch = 0
        self.time.done("evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.time.done("save")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        metric = args.metric_for_best_model  # a line of 80 characters has no place for eval_loss beside it
        names = ("loss", metric if metric in (logs or {}) else "eval_loss")
        values = {name: float(value) for name, value in (logs or {}).items() if name in names}
        if values and state.is_world_process_zero:
            left = self.time.seconds(state.global_step)
            speed = self.metrics.speed if "loss" in values else None
            self.display.report(state.global_step, state.max_steps, values, speed, left)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display.close()


def _intervals(args: Any, state: Any) -> tuple[float | None, float | None]:
    """Return the steps between evaluations, and between checkpoints; None if there is one at the end only."""
    of_epoch = state.max_steps / args.num_train_epochs if args.num_train_epochs else None
    every = {"steps": (state.eval_steps, state.save_steps), "epoch": (of_epoch, of_epoch)}
    return tuple(  # type: ignore[return-value]
        every.get(str(getattr(strategy, "value", strategy)), (None, None))[place]
        for place, strategy in enumerate((args.eval_strategy, args.save_strategy))
    )


def remove_own_printing(trainer: Any) -> None:
    """Remove the Trainer's own printing of dicts."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


class StopAtStep(TrainerCallback):
    """Ends training with a checkpoint after the step in which a stop was requested.

    Add this callback last. A checkpoint between an epoch's last step and its end would be wrong: a run resumed from it
    would begin the next epoch, or find training finished, and never log and evaluate the epoch. So at an epoch's last
    step, logging, evaluation and saving are deferred to the epoch's end. Several processes agree at each step, so all
    processes stop at the same step.
    """

    def __init__(self) -> None:
        self.stopping = False  # True at the step where all processes stop
        self.in_epoch = False  # True until the end of the current epoch
        self.deferred: set[str] = set()  # names of control flags that are set again at the end of the epoch

    def is_due(self, args: Any, state: Any) -> bool:
        """Return True if training ends after the current step. Every process must call this method."""
        return stop_requested(args)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_epoch = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_due(args, state):
            if not self.stopping:
                screen.show(f"    Stopping at step {state.global_step}; a checkpoint is written")
            self.stopping = control.should_save = True
            # Only the epoch is ended, because early stopping may still end training after this step's evaluation.
            control.should_epoch_stop = True
            # Otherwise the Trainer would save only after a better evaluation
            if args.save_strategy == SaveStrategy.BEST:
                args.save_strategy = SaveStrategy.STEPS
        if control.should_training_stop or float(state.epoch).is_integer():
            self._defer(control, "should_log", "should_evaluate", "should_save")
        elif self.stopping:
            self._defer(control, "should_save")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop and self.in_epoch:  # training has stopped early
            self._defer(control, "should_save")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_epoch = False
        if self.stopping:
            if not (control.should_training_stop or float(state.epoch).is_integer()):
                # The epoch is not finished. The resumed run logs and evaluates at the epoch's real end.
                control.should_log = control.should_evaluate = False
            control.should_training_stop = True
        for name in self.deferred:
            setattr(control, name, True)
        self.deferred.clear()

    def _defer(self, control: Any, *names: str) -> None:
        """Defer the flags in `names` that `control` has set to the end of the epoch."""
        for name in names:
            if getattr(control, name):
                self.deferred.add(name)
                setattr(control, name, False)


def stop_requested(args: Any) -> bool:
    """Return True if a stop was requested in any process of the run.

    Every process must call this function.
    """
    if args.world_size > 1:
        largest = torch.tensor(interrupts.requested(), device=args.device)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        interrupts.request(int(largest))
    return interrupts.requested() > 0
