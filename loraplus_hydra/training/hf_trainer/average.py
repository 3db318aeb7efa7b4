"""Averages of the trained weights: the exponential one of `trainer.ema`, and that of rungs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from loraplus_hydra.errors import UserError, first_line
from loraplus_hydra.io import screen

EMA, OF_RUNGS = "ema", "rung_average"  # a Trainer's attributes with averages
_RECENT = 3  # the average of rungs weighs the last third of the steps most
_METRICS = ("_metrics", "_stored_metrics")  # attributes of TRL's trainers with values for the next line of the log


class Average:
    """The average of a model's trained tensors.

    It is kept in float32, and begins with the weights that the model has now.
    """

    def __init__(self, model: Any) -> None:
        self._trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.tensors = {
            name: each.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            for name, each in self._trained.items()
        }

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Set the average to `decay` x average + (1 - `decay`) x weights."""
        for name, parameter in self._trained.items():
            self.tensors[name].mul_(decay).add_(parameter.to(torch.float32), alpha=1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the average into the model inside the block, and the weights back after it."""
        weights = {name: each.detach().clone() for name, each in self._trained.items()}
        try:
            self._put(self.tensors)
            yield
        finally:
            self._put(weights)

    def save(self, file: Path) -> None:
        """Write the average."""
        save_file(self.tensors, file)

    def load(self, file: Path) -> None:
        """Read the average. Raises UserError if it is another model's."""
        try:
            stored = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} can't be read: {first_line(error)}") from None
        own = {name: each.shape for name, each in self.tensors.items()}
        if own != {name: each.shape for name, each in stored.items()}:
            raise UserError(f"{file} doesn't belong to this run: its tensors have other names or shapes")
        for name, tensor in stored.items():
            self.tensors[name].copy_(tensor)

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(values[name])


class AveragingMixin:
    """A mixin that evaluates the average after the weights: `eval_ema_loss` beside `eval_loss`."""

    ema: Average | None = None  # set when training begins

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the weights, then the average."""
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        if self.ema is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            with self.ema.in_model(), _own_metrics(self):
                averaged = super().evaluation_loop(*args, **{**kwargs, "metric_key_prefix": f"{prefix}_ema"})  # type: ignore[misc]
            averaged.metrics.pop(f"{prefix}_ema_model_preparation_time", None)  # measured once
            output.metrics.update(averaged.metrics)
        return output

    def _load_best_model(self) -> None:
        """Load like the Trainer, and the average of the same checkpoint."""
        super()._load_best_model()  # type: ignore[misc]
        if self.ema is not None:
            self.ema = read_average(EMA, self.model, Path(str(self.state.best_model_checkpoint)))  # type: ignore[attr-defined]


class AverageCallback(TrainerCallback):
    """Begins, updates, saves and restores an average of a Trainer's weights.

    `name` is the Trainer's attribute that has the average, and `decay` returns the share of it that a step keeps. Add
    this callback before CheckpointCallback.
    """

    def __init__(self, trainer: Any, name: str, decay: Callable[[int], float]) -> None:
        self.trainer = trainer
        self.name = name
        self.decay = decay

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Only now, because the model is on its device, and a resumed run has loaded its weights
        resumed = isinstance(args.resume_from_checkpoint, str)
        checkpoint = Path(args.resume_from_checkpoint) if resumed else None
        setattr(self.trainer, self.name, read_average(self.name, self.trainer.model, checkpoint))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # float16's scaler skips steps
            self._average.update(self.decay(state.global_step + 1))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._average.save(file_of(self.name, Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    @property
    def _average(self) -> Average:
        average: Average = getattr(self.trainer, self.name)
        return average


def decay_for_rungs(step: int) -> float:
    """Return the decay of polynomial-decay averaging (Shamir and Zhang 2013, section 3.3)."""
    # With a high rate the loss rises and falls from step to step, until the rate is low. The average of the last steps
    # doesn't, and its order is nearer to that of the end (benchmarks/README.md). This average needs no first step: it
    # forgets the earlier ones as fast as their number grows.
    return 1 - (_RECENT + 1) / (step + _RECENT)


def read_average(name: str, model: Any, checkpoint: Path | None) -> Average:
    """Return the average `name` of a checkpoint.

    Without a checkpoint, or without a file there, it begins with the model's weights.
    """
    average = Average(model)
    if checkpoint is not None and (file := file_of(name, checkpoint)).is_file():
        average.load(file)
    elif checkpoint is not None:
        screen.show(f"    Note: {checkpoint.name} has no {file.name}, so it begins with this step's weights")
    return average


def file_of(name: str, checkpoint: Path) -> Path:
    """Return the file of a checkpoint that has the average `name`.

    Its tensors are in float32, by the parameters' names.
    """
    return checkpoint / f"{name}.safetensors"


def with_average(trainer_class: type[Trainer]) -> type[Any]:
    """Return `trainer_class` with the mixin that evaluates the average."""
    return type(f"Averaging{trainer_class.__name__}", (AveragingMixin, trainer_class), {})


@contextmanager
def _own_metrics(trainer: Any) -> Iterator[None]:
    """Keep values that TRL collects in the block out of the metrics of the evaluation before."""
    kept = {name: copy.deepcopy(held) for name, held in vars(trainer).items() if name in _METRICS}
    try:
        yield
    finally:
        for name, held in kept.items():
            setattr(trainer, name, held)
