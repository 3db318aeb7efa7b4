"""The Trainer of the classification task."""

from __future__ import annotations

from transformers import Trainer


class ClassificationTrainer(Trainer):
    """transformers' Trainer, with the loss of a step averaged over its accumulated batches."""

    # A classifier's loss is a mean over the batch. But its `forward` has keyword arguments, and so the Trainer assumes
    # that the loss is already divided by the accumulation steps. The gradient would be N times too large.
    loss_is_scaled_for_ga = False
