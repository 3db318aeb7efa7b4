"""Many jobs in one process: around each, what a job may change of the process is as in a fresh one."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.io.quiet_libraries import quiet_libraries
from loraplus_hydra.training.measure import reset_peak_memory

Restore = Callable[[], Any]


@contextmanager
def isolated(config: DictConfig) -> Iterator[None]:
    """Put back, behind a job of `config`, whatever of the process it has changed, and free its memory.

    What the job needs is imported first, so that what an import sets once for the process stays.
    """
    quiet_libraries()
    _import_what_it_needs(config)
    reset_peak_memory()
    restores = [_environment(), _folder(), _loggers(), _random(), *_torch()]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for restore in reversed(restores):
            restore()
        _forget()


def free(error: BaseException) -> None:
    """Let go of what the frames behind `error` hold: the failed job's model, optimizer and data."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    free_memory()


def free_memory() -> None:
    """Collect what is in cycles, and give torch's cached GPU memory back."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _import_what_it_needs(config: DictConfig) -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401

    # These two would come later, and set a variable of the environment: with the first rows, with the first model.
    import scipy.io  # noqa: F401
    import transformers.generation.utils
    import transformers.trainer  # noqa: F401

    for group in ("task", "optimizer", "scheduler", "adapter", "data"):
        with suppress(UserError, AttributeError, TypeError):  # the check tells what is wrong with the name
            locate(config[group]._target_)


def _environment() -> Restore:
    before = dict(os.environ)

    def restore() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    return restore


def _folder() -> Restore:
    before = os.getcwd()  # noqa: PTH109
    return lambda: os.chdir(before)


def _loggers() -> Restore:
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, one.level, one.propagate, one.disabled) for one in (logging.root, *known)]
    threshold = logging.root.manager.disable

    def restore() -> None:
        for logger, level, propagate, disabled in before:
            if logger.level != level:
                logger.setLevel(level)
            logger.propagate, logger.disabled = propagate, disabled
        logging.disable(threshold)

    return restore


def _random() -> Restore:
    import numpy as np
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = torch.initial_seed()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # since the job
            torch.cuda.manual_seed_all(seed)

    return restore


def _torch() -> list[Restore]:
    import torch
    from torch.backends import cuda, cudnn

    settings: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        (_determinism, _set_determinism),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        # Set to the CPU it would send every call through Python; None is what it is without being set.
        (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    ]
    for holder, names in (
        (cudnn, ("enabled", "benchmark", "deterministic")),
        # float32 products in fewer bits; torch before 2.9 has the second name alone, and later ones refuse the mixture
        *((one, ("fp32_precision",)) for one in (torch.backends, cuda.matmul, cudnn) if _has(one, "fp32_precision")),
        *((one, ("allow_tf32",)) for one in (cuda.matmul, cudnn) if not _has(one, "fp32_precision")),
    ):
        settings += [(_get(holder, name), _set(holder, name)) for name in names]
    return [_setting(get, put) for get, put in settings]


def _setting(get: Callable[[], Any], put: Callable[[Any], Any]) -> Restore:
    before = get()

    def restore() -> None:
        if get() != before:
            put(before)

    return restore


def _has(holder: Any, name: str) -> bool:
    try:
        return hasattr(holder, name)
    except RuntimeError:
        return False


def _get(holder: Any, name: str) -> Callable[[], Any]:
    return lambda: getattr(holder, name)


def _set(holder: Any, name: str) -> Callable[[Any], Any]:
    return lambda value: setattr(holder, name, value)


def _determinism() -> tuple[bool, bool]:
    import torch

    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(state: tuple[bool, bool]) -> None:
    import torch

    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _forget() -> None:
    """Empty what libraries keep for the whole process: accelerate's state, bitsandbytes' overrides, compiled code,
    a tracker's session."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    if (optimizer := sys.modules.get("bitsandbytes.optim.optimizer")) is not None:
        optimizer.GlobalOptimManager._instance = None
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
    if (mlflow := sys.modules.get("mlflow")) is not None and mlflow.active_run() is not None:
        mlflow.end_run()
    free_memory()
