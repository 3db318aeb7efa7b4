"""Averages of the trained weights: the exponential one of `trainer.ema`, and that of rungs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from loraplus_hydra.errors import UserError, first_line
from loraplus_hydra.io import screen

# In a checkpoint: the averages in float32, by the parameters' names
AVERAGE, OF_RUNGS = "ema.safetensors", "rung_average.safetensors"
_RECENT = 3  # the average of rungs weighs the last third of the steps most
_METRICS = ("_metrics", "_stored_metrics")  # attributes of TRL's trainers with values for the next line of the log


class Average:
    """The average of a model's trained tensors.

    It is kept in float32, and begins with the weights that the model has now. `file` is its name in a checkpoint.
    """

    def __init__(self, model: Any, file: str = AVERAGE) -> None:
        self._file = file
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

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        save_file(self.tensors, folder / self._file)

    def load(self, folder: Path) -> None:
        """Read the average of a checkpoint. Raises UserError if it is another model's."""
        try:
            stored = load_file(folder / self._file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / self._file} can't be read: {first_line(error)}") from None
        own = {name: each.shape for name, each in self.tensors.items()}
        if own != {name: each.shape for name, each in stored.items()}:
            raise UserError(f"{folder / self._file} doesn't belong to this run: its tensors have other names or shapes")
        for name, tensor in stored.items():
            self.tensors[name].copy_(tensor)

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(values[name])


class AveragingMixin:
    """A mixin that evaluates the average after the weights: `eval_ema_loss` beside `eval_loss`."""

    average: Average | None = None  # set when training begins

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the weights, then the average."""
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        if self.average is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            with self.average.in_model(), _own_metrics(self):
                averaged = super().evaluation_loop(*args, **{**kwargs, "metric_key_prefix": f"{prefix}_ema"})  # type: ignore[misc]
            averaged.metrics.pop(f"{prefix}_ema_model_preparation_time", None)  # measured once
            output.metrics.update(averaged.metrics)
        return output

    def _load_best_model(self) -> None:
        """Load like the Trainer, and the average of the same checkpoint."""
        super()._load_best_model()  # type: ignore[misc]
        if self.average is not None:
            self.average.load(Path(str(self.state.best_model_checkpoint)))  # type: ignore[attr-defined]


class AverageCallback(TrainerCallback):
    """Begins, updates, saves and restores a Trainer's average.

    Add this callback before CheckpointCallback.
    """

    def __init__(self, trainer: Any, decay: float) -> None:
        self.trainer = trainer
        self.decay = decay

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Only now, because the model is on its device, and a resumed run has loaded its weights
        self.trainer.average = Average(self.trainer.model)
        if not isinstance(args.resume_from_checkpoint, str):
            return
        checkpoint = Path(args.resume_from_checkpoint)
        if (checkpoint / AVERAGE).is_file():
            self.trainer.average.load(checkpoint)
        else:
            screen.show(f"    Note: {checkpoint.name} has no average, so it begins with the weights of this step")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # float16's scaler skips steps
            self.trainer.average.update(self.decay)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.average.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class RungAverageCallback(TrainerCallback):
    """Keeps the average of the weights that is compared at a rung.

    Add this callback before CheckpointCallback.
    """

    # With a high rate the loss rises and falls from step to step, until the rate is low. The average of the last steps
    # doesn't, and its order is nearer to that of the end (benchmarks/README.md). As in Shamir and Zhang 2013 (3.3), the
    # average needs no first step: it forgets the earlier ones as fast as their number grows.

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.rung_average = Average(self.trainer.model, OF_RUNGS)
        checkpoint = args.resume_from_checkpoint
        if isinstance(checkpoint, str) and (Path(checkpoint) / OF_RUNGS).is_file():
            self.trainer.rung_average.load(Path(checkpoint))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            step = state.global_step + 1
            self.trainer.rung_average.update(1 - (_RECENT + 1) / (step + _RECENT))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.rung_average.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


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
