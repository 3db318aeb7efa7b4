"""The process state that a job may change, and that is restored after the job."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.backends import cuda, cudnn

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import UserError

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # (getter, setter)


@contextmanager
def process_state() -> Iterator[None]:
    """Restore the state of the process when the block ends."""
    before = [get() for get, _ in _SETTINGS]
    folder, generators = Path.cwd(), random_states()
    seed, used_gpus = torch.initial_seed(), torch.cuda.is_initialized()
    try:
        yield
    finally:
        for (get, put), value in reversed(list(zip(_SETTINGS, before, strict=True))):
            if get() != value:  # some setters have other effects, such as importing a compiler
                put(value)
        os.chdir(folder)
        set_random_states(generators)
        if torch.cuda.is_initialized() and not used_gpus:  # the job was the first to use a GPU
            torch.cuda.manual_seed_all(seed)


def import_early(config: DictConfig) -> None:
    """Import the libraries that the job needs, before `process_state` saves the state."""
    # Settings that an import makes once for the process must not be undone.
    import datasets  # noqa: F401
    import peft  # noqa: F401

    # Otherwise the first rows and the first model would import these modules, which set environment variables.
    import scipy.io  # noqa: F401
    import transformers.generation.utils
    import transformers.trainer  # noqa: F401

    for group in ("task", "optimizer", "scheduler", "adapter", "data"):
        with suppress(UserError, OmegaConfBaseException, AttributeError, TypeError):  # the check reports invalid names
            locate(config[group]._target_)


def random_states() -> tuple[Any, ...]:
    """Return the states of Python's, numpy's and torch's generators."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), on_gpus


def set_random_states(states: tuple[Any, ...]) -> None:
    """Restore what `random_states` returned."""
    python, of_numpy, cpu, on_gpus = states
    random.setstate(python)
    numpy.random.set_state(of_numpy)
    torch.set_rng_state(cpu)
    if on_gpus is not None:
        torch.cuda.set_rng_state_all(on_gpus)


def _set_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _loggers() -> tuple[list[tuple[logging.Logger, int, bool, bool]], int]:
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    states = [(one, one.level, one.propagate, one.disabled) for one in (logging.root, *known)]
    return states, logging.root.manager.disable


def _set_loggers(before: tuple[list[tuple[logging.Logger, int, bool, bool]], int]) -> None:
    states, threshold = before
    for logger, level, propagate, disabled in states:
        if logger.level != level:  # setting a level clears a cache of all loggers
            logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
    logging.disable(threshold)


def _set_default_device(device: torch.device) -> None:
    # None is the state before the first call. After a set to the CPU, torch would pass every call through Python.
    torch.set_default_device(None if device.type == "cpu" else device)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _attribute(holder: Any, name: str) -> Setting:
    return partial(getattr, holder, name), partial(setattr, holder, name)


def _float32_precision() -> list[Setting]:
    """Return the settings that allow fewer bits in float32 products."""
    if hasattr(torch.backends, "fp32_precision"):  # new in torch 2.9, which refuses a mixture with the old names
        return [_attribute(holder, "fp32_precision") for holder in (torch.backends, cuda.matmul, cudnn)]
    return [_attribute(holder, "allow_tf32") for holder in (cuda.matmul, cudnn)]


_SETTINGS: list[Setting] = [
    (lambda: dict(os.environ), _set_environment),
    (_loggers, _set_loggers),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (_determinism, _set_determinism),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    *(_attribute(cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    *_float32_precision(),
]
