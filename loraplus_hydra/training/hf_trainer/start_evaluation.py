"""The evaluation before the first step, made once for all jobs of a process that begin alike.

Jobs that differ only in their rates begin with the same model, so they have the same metrics before training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.io import processes
from loraplus_hydra.training.prepare import Prepared
from loraplus_hydra.training.process_state import random_states, set_random_states

_OF_STEPS = ("optimizer", "scheduler", "loraplus", "logger")  # groups that decide nothing before the first step
_CODE = ("_target_", "examples", "args_class", "auto_class")  # keys whose values are dotted paths
_LIBRARIES = ("loraplus_hydra", "peft", "torch", "transformers", "trl")
_MOST = 32  # evaluations that are kept
_known: dict[str, tuple[dict[str, float], tuple[Any, ...]]] = {}  # key -> metrics, and the generators' states after it


def start_key(job: Prepared) -> str | None:
    """Return a text that is equal for jobs that begin alike; None if this is unknown."""
    # Several processes must all evaluate or none. The rows of a stream have no fingerprint. And code of your own may
    # have changed since the last job, in a notebook, or do more than return metrics.
    settings = {name: group for name, group in plain_of(job.config).items() if name not in _OF_STEPS}
    has_own_code = settings["model"]["trust_remote_code"] or not all(map(_is_known, _code_of(settings)))
    if processes.world_size() > 1 or has_own_code or not {"data.eval", "weights"} <= job.inputs.keys():
        return None
    return json.dumps([settings, dict(job.inputs)], sort_keys=True, default=str)


def _code_of(settings: Any) -> Iterator[str]:
    """Yield the dotted paths of classes and functions in a config."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _code_of(value)
        elif key in _CODE and isinstance(value, str):
            yield value


def _is_known(path: str) -> bool:
    return path.partition(".")[0] in _LIBRARIES


def evaluate_once(trainer: Any, start: str, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the metrics of `evaluate`, or those of an earlier job that began alike.

    Such a job had the same `start`, trained weights and random numbers. In both cases the metrics are logged, and the
    generators of random numbers are as after the evaluation.
    """
    key = _key(trainer.model, start)
    if key not in _known:
        metrics = evaluate()
        _known[key] = (dict(metrics), random_states())
        while len(_known) > _MOST:
            del _known[next(iter(_known))]
        return metrics
    metrics, states = dict(_known[key][0]), _known[key][1]
    set_random_states(states)
    trainer.log(metrics)
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def _key(model: torch.nn.Module, start: str) -> str:
    digest = hashlib.blake2b(start.encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(_bytes(parameter))
    for state in random_states():
        states = state if isinstance(state, list) else [state]
        for one in states:
            digest.update(_bytes(one) if isinstance(one, torch.Tensor) else repr(one).encode())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
