"""The Trainer of the classification task."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


class ClassificationTrainer(Trainer):
    """transformers' Trainer, with the loss of a step averaged over its batches and processes."""

    # A classifier's loss is a mean over the batch. But its `forward` has keyword arguments, and so the Trainer assumes
    # that the loss is already divided by the accumulation steps. The gradient would be N times too large.
    loss_is_scaled_for_ga = False

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        """Return None, because no loss is divided by the labels of all batches and processes."""
        # With a number, the Trainer multiplies the mean by the processes, and smoothed labels are divided twice.
