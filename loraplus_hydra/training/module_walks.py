"""The Trainer's walks over all modules and parameters, made once instead of at every step."""

from __future__ import annotations

import functools
from typing import Any


def walk_once(trainer: Any) -> None:
    """Cache the modules and parameters for which a Trainer searches at every step.

    The Trainer's results stay the same. This is only valid for a Trainer in one process whose model is not wrapped or
    sharded.
    """
    model, accelerator = trainer.model, trainer.accelerator
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(model.training)  # a loaded base is in eval mode under a new adapter; `train` below needs one mode
    set_mode, clip = model.train, accelerator.clip_grad_norm_

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else set_mode(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    def clip_grad_norm(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        return clip(trained, *args, **kwargs)

    model.train, model.zero_grad = train, zero_grad
    model.num_parameters = functools.cache(model.num_parameters)  # used for the number of floating-point operations
    accelerator.clip_grad_norm_ = clip_grad_norm
