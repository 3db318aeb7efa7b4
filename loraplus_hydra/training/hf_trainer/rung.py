"""The end of training at a rung of a halved sweep, with the losses on held-out rows there."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.rungs import FEWEST_STEPS, Rung
from loraplus_hydra.training.hf_trainer.average import OF_RUNGS
from loraplus_hydra.training.hf_trainer.callbacks import StopAtStep
from loraplus_hydra.training.hf_trainer.loraplus_mixin import NotFiniteError, loss_tokens

_FEWEST_ROWS = 200  # held-out rows on which jobs are compared
_FEWEST_BATCHES = 8  # in place of rows, for losses of a whole batch
# Differences of a batch's loss to its rows' mean, which rounding explains: relative, and of losses near zero
_EQUAL, _EQUAL_ZERO = 1e-4, 1e-7
_CLASSIFIED: dict[str, Any] = {  # problem_type -> its loss
    "single_label_classification": nn.functional.cross_entropy,
    "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
    "regression": nn.functional.mse_loss,
}
_ROWS = 1600  # times the share of the steps: later rungs have fewer jobs and smaller differences


class RungReached(Exception):
    """The end of training at a rung."""

    def __init__(self, rung: Rung) -> None:
        super().__init__(f"rung at step {rung.step}")
        self.rung = rung


class StopAtRung(StopAtStep):
    """Ends training with a checkpoint at a rung, and raises RungReached with the losses there.

    The losses are those of the average of the weights (decay_for_rungs), and at the last step those of the weights.
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
        measured: tuple[Any, ...] = ()
        if state.global_step == self.step:
            average = getattr(self.trainer, OF_RUNGS, None)
            # At the last step there is nothing left to predict
            with nullcontext() if average is None or self.step == state.max_steps else average.in_model():
                # Of its own step, because rungs of several shares can be at one step, and need the same rows there
                measured = _row_losses(self.trainer, self.step / state.max_steps)
        raise RungReached(Rung(self.stop_at, self.step, state.max_steps, self.earliest, *measured))


@dataclass(frozen=True)
class _Measured:
    """The losses of the rung's rows."""

    losses: list[float]  # of each row, or of each batch if its rows have no losses of their own
    weights: list[float]  # their numbers of tokens with loss; without labels of tokens, their numbers of rows
    predictions: list[Any]  # (logits, labels) of each batch


def _row_losses(trainer: Any, share: float) -> tuple[tuple[float, ...], tuple[float, ...], float | None]:
    """Return the losses of the rung's rows, their numbers of tokens with loss, and the task's metric.

    Raises NotFiniteError if a loss is NaN or infinite, and UserError if no row has tokens with loss.
    """
    rows, count = trainer.eval_dataset, len(trainer.eval_dataset)
    chosen = min(count, max(_FEWEST_ROWS, round(_ROWS * share)))
    rows = rows.select([place * count // chosen for place in range(chosen)])
    trainer.model.eval()
    size = trainer.args.per_device_eval_batch_size
    # In batches, because it takes a fraction of the time. Some losses are known only for a batch (DPO's), and some are
    # losses of a whole batch (KTO's and ORPO's). Then a batch counts like a row.
    found = _measure(trainer, rows, size)
    if found is None:
        found = _measure(trainer, rows, min(size, max(2, chosen // _FEWEST_BATCHES)), whole=True)
    assert found is not None
    if not any(found.weights):
        what = f"none of the {chosen} held-out rows of the rung has tokens with loss, so jobs can't be compared"
        raise UserError(f"{what}; train all of them with halving=false, or use longer rows (task.args.max_length)")
    return tuple(found.losses), tuple(found.weights), _metric(trainer, found.predictions)


def _measure(trainer: Any, rows: Any, size: int, *, whole: bool = False) -> _Measured | None:
    """Predict `rows` in batches of `size`. With `whole`, each batch has one loss, its own.

    Return None if the model doesn't return the losses of a batch's rows.
    """
    found, done = _Measured([], [], []), 0
    for inputs in trainer._get_dataloader(rows, "Rung", batch_size=size, sampler_fn=SequentialSampler):
        has_tokens = getattr(trainer, "_loss_shifts_labels", False) and "labels" in inputs  # a pair of answers has none
        tokens = loss_tokens(inputs) if has_tokens else 1
        count = min(size, len(rows) - done)
        done += count
        if (whole or size == 1) and not tokens:
            found.losses.append(0.0)
            found.weights.append(0.0)
            continue
        with _outputs(trainer.model) as outputs:
            mean, *predicted = trainer.prediction_step(trainer.model, inputs, trainer.compute_metrics is None)
        loss = float(mean)
        if size > 1 and not whole:
            each = _by_row(outputs, inputs, trainer.model, loss)
        elif math.isfinite(loss):
            each = ([loss], [float(tokens if has_tokens else count)])
        else:
            raise NotFiniteError(f"the loss is {loss} on a held-out row at step {trainer.state.global_step}")
        if each is None or len(each[0]) != (1 if whole else count):  # without padding, rows are joined to one
            return None
        found.losses.extend(each[0])
        found.weights.extend(each[1])
        found.predictions.append(predicted)
    return found


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Any]]:
    """Collect what `model` returns in the block."""
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def _by_row(
    outputs: Sequence[Any], inputs: Mapping[str, Any], model: Any, mean: float
) -> tuple[list[float], list[float]] | None:
    """Return the losses of a batch's rows, and their numbers of tokens with loss.

    None if they don't give the batch's loss, `mean`: the loss is of another kind, such as DPO's, or not finite.
    """
    output: Any = outputs[-1] if outputs else None
    labels = inputs.get("labels")
    of_labels = _CLASSIFIED.get(str(getattr(model.config, "problem_type", None)))
    if isinstance(scores := getattr(output, "log_probs", None), torch.Tensor):  # TRL's output, which has no logits
        weights = output.label_mask.sum(1).cpu()
        losses = -scores.cpu().double().sum(1) / weights.clamp(min=1)
    elif of_labels and labels is not None and isinstance(logits := getattr(output, "logits", None), torch.Tensor):
        logits = logits.float().view_as(labels) if logits.numel() == labels.numel() else logits.float()
        losses = of_labels(logits, labels, reduction="none").cpu().double().reshape(len(labels), -1).mean(1)
        weights = torch.ones_like(losses)
    else:
        return None
    total = float((losses * weights).sum() / weights.sum().clamp(min=1))
    return (
        (losses.tolist(), weights.tolist()) if math.isclose(total, mean, rel_tol=_EQUAL, abs_tol=_EQUAL_ZERO) else None
    )


def _metric(trainer: Any, predictions: Sequence[Any]) -> float | None:
    """Return `task.metric` of each batch's (logits, labels).

    None if `compute_metrics` doesn't return it, or if it isn't finite.
    """
    if trainer.compute_metrics is None:
        return None
    logits, labels = (functools.reduce(nested_concat, each) for each in zip(*predictions, strict=True))
    computed = trainer.compute_metrics(EvalPrediction(nested_numpify(logits), nested_numpify(labels)))
    value = float(computed.get(str(trainer.args.metric_for_best_model).removeprefix("eval_"), math.nan))
    return value if math.isfinite(value) else None
