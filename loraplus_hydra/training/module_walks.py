"""The Trainer's walks over all modules and parameters, made once in place of at every step."""

from __future__ import annotations

import functools
from typing import Any


def walk_once(trainer: Any) -> None:
    """Keep what a Trainer looks for in its model at every step. What it computes from it is the same.

    For a Trainer in one process, whose model nothing wraps or shards.
    """
    model, accelerator = trainer.model, trainer.accelerator
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    set_mode, clip = model.train, accelerator.clip_grad_norm_

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else set_mode(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    def clip_grad_norm(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        return clip(trained, *args, **kwargs)

    model.train, model.zero_grad = train, zero_grad
    model.num_parameters = functools.cache(model.num_parameters)  # for its count of floating-point operations
    accelerator.clip_grad_norm_ = clip_grad_norm
