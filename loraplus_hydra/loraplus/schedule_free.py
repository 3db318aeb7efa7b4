"""Schedule-free optimizers, which evaluate and save an average of their weights (arXiv 2405.15682).

The package `schedulefree` computes either weights from the other, with rounding. So each switch would change the
training, and a resumed run would not be equal. Here, the trained weights are kept while the others are in use.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

TRAINED_WEIGHTS = "trained_weights"  # key of a tensor's state while the averaged weights are in use
RUNNING_VALUES = ("k", "train_mode", "weight_sum", "lr_max", "scheduled_lr")
"""Entries of the package's parameter groups that change in each step. They are state, not settings."""

NOT_CONSTANT = (
    "a schedule-free optimizer averages the weights in place of a falling rate, so the schedule must not fall; use "
    "scheduler=constant, and optimizer.warmup_steps for a warm-up"
)


class ScheduleFree(Optimizer):
    """A mixin ahead of the package's classes: the switch from the trained weights and back is exact.

    A new optimizer is ready to train.
    """

    @torch.no_grad()
    def train(self) -> None:
        """Put the trained weights into the model."""
        super().train()  # type: ignore[misc]
        for group in self.param_groups:
            for parameter in group["params"]:
                if TRAINED_WEIGHTS in self.state[parameter]:
                    parameter.copy_(self.state[parameter].pop(TRAINED_WEIGHTS))

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averaged weights, to be evaluated and saved, into the model."""
        for group in self.param_groups:
            for parameter in group["params"] if group["train_mode"] else ():
                if "z" in self.state[parameter]:
                    self.state[parameter][TRAINED_WEIGHTS] = parameter.detach().clone()
        super().eval()  # type: ignore[misc]
