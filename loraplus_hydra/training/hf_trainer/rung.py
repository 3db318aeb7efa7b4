"""The end of training at a rung of a halved sweep, with the losses on held-out rows there."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from loraplus_hydra.io import interrupts
from loraplus_hydra.io.rungs import FEWEST_STEPS, Rung
from loraplus_hydra.training.hf_trainer.callbacks import StopAtStep
from loraplus_hydra.training.hf_trainer.loraplus_mixin import NotFiniteError, loss_tokens

_FEWEST_ROWS = 200  # held-out rows on which jobs are compared
_ROWS = 1600  # times the share of the steps: later rungs have fewer jobs and smaller differences


class RungReached(Exception):
    """The end of training at a rung."""

    def __init__(self, rung: Rung) -> None:
        super().__init__(f"rung at step {rung.step}")
        self.rung = rung


class StopAtRung(StopAtStep):
    """Ends training with a checkpoint at a rung, and raises RungReached with the losses there.

    `stop_at` is a share of all steps. If the run's last checkpoint is of the rung's step or later, no step is taken.
    """

    # The losses are computed after the checkpoint is saved. So they change no bit of the run that resumes from it.

    def __init__(self, trainer: Any, stop_at: float) -> None:
        super().__init__()
        self.trainer = trainer
        self.stop_at = stop_at
        self.step = self.earliest = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.max_steps
        # A run that is only restored at its last step has no optimizer. It is beyond any warm-up.
        warm_up = self.trainer.warm_up_steps(steps) if self.trainer.optimizer is not None else 0
        self.earliest = max(FEWEST_STEPS, warm_up)
        self.step = min(max(round(self.stop_at * steps), self.earliest), steps)
        if state.global_step >= self.step:
            self._reach(state)

    def is_due(self, args: Any, state: Any) -> bool:
        return super().is_due(args, state) or state.global_step >= self.step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping and state.global_step == self.step and not interrupts.requested():
            self._reach(state)

    def _reach(self, state: Any) -> None:
        is_there = state.global_step == self.step
        measured = _row_losses(self.trainer, self.stop_at) if is_there else ()
        raise RungReached(Rung(self.stop_at, self.step, state.max_steps, self.earliest, *measured))


def _row_losses(trainer: Any, share: float) -> tuple[tuple[float, ...], tuple[float, ...], float | None]:
    """Return the losses of the rung's rows, their numbers of tokens with loss, and the task's metric.

    Raises NotFiniteError if a loss is NaN or infinite.
    """
    rows, count = trainer.eval_dataset, len(trainer.eval_dataset)
    chosen = min(count, max(_FEWEST_ROWS, round(_ROWS * share)))
    rows = rows.select([place * count // chosen for place in range(chosen)])
    trainer.model.eval()
    losses, weights, predictions = [], [], []
    # One row at a time: a batch's loss is a mean, and the shortest batch has no padding
    for inputs in trainer._get_dataloader(rows, "Rung", batch_size=1, sampler_fn=SequentialSampler):
        tokens = loss_tokens(inputs) if getattr(trainer, "_loss_shifts_labels", False) else 1
        if not tokens:
            losses.append(0.0)
            weights.append(0.0)
            continue
        found, *predicted = trainer.prediction_step(trainer.model, inputs, trainer.compute_metrics is None)
        loss = float(found)
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss} on a held-out row at step {trainer.state.global_step}")
        losses.append(loss)
        weights.append(float(tokens))
        predictions.append(predicted)
    return tuple(losses), tuple(weights), _metric(trainer, predictions)


def _metric(trainer: Any, predictions: Sequence[Any]) -> float | None:
    """Return `task.metric` of (logits, labels) for each row; None if `compute_metrics` doesn't return it."""
    if trainer.compute_metrics is None:
        return None
    logits, labels = (functools.reduce(nested_concat, each) for each in zip(*predictions, strict=True))
    computed = trainer.compute_metrics(EvalPrediction(nested_numpify(logits), nested_numpify(labels)))
    return computed.get(str(trainer.args.metric_for_best_model).removeprefix("eval_"))
