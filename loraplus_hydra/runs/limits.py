"""Messages about the machine's limits: too little memory, a full disk, a removed folder."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.errors import UserError, first_line
from loraplus_hydra.loraplus.memory import estimate
from loraplus_hydra.training.prepare import plan_on_meta

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_cpu")
# On a full disk, torch.save only reports that its file is too short ("unexpected pos").
_NO_SPACE = ("no space left", "disk quota exceeded", "pytorchstreamwriter failed", "unexpected pos")


class MachineLimitError(UserError):
    """The machine has too little memory or disk for the config."""


@contextmanager
def explain_resource_errors(config: DictConfig, folder: Path) -> Iterator[None]:
    """Turn errors of memory and disk into a MachineLimitError with advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors' exception is not a subclass of OSError
        if message := _explanation(error, config, folder):
            raise MachineLimitError(message) from error
        raise


def _explanation(error: Exception, config: DictConfig, folder: Path) -> str:
    """Return the message about an error of memory or disk; empty for any other error."""
    if is_out_of_memory(error):
        return _memory_advice(config, error)
    if is_disk_full(error):
        command = f"python -m loraplus_hydra resume {shlex.quote(str(folder))}"
        return (
            f"the disk is full ({first_line(error)}). Earlier checkpoints are complete; free some space, then "
            f"resume with {command} (trainer.save_total_limit keeps fewer checkpoints)"
        )
    if isinstance(error, (OSError, RuntimeError)) and not folder.is_dir():
        return f"the run's folder {folder}, or its disk, has been removed: {first_line(error)}"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.filename or folder} can't be written: {error.strerror}"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if torch or the operating system could not allocate memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def is_disk_full(error: BaseException) -> bool:
    """Return True if a file could not be written because the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error).lower() for words in _NO_SPACE)


def _memory_advice(config: DictConfig, error: BaseException) -> str:
    trainer: Any = config.trainer
    batch, accumulated = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    changes = []
    if batch > 1:
        half = max(1, batch // 2)
        changes.append(
            f"trainer.per_device_train_batch_size={half} "
            f"trainer.gradient_accumulation_steps={accumulated * -(-batch // half)} (the same steps)"
        )
    if not trainer.get("activation_checkpointing"):
        changes.append("trainer.activation_checkpointing=true")
    if not config.quantization.get("_target_"):
        changes.append("quantization=nf4")
    if "8bit" not in str(config.optimizer._target_):
        changes.append("optimizer=adamw8bit")
    changes.append("shorter rows")
    return (
        f"out of memory: {first_line(error)}. Without activations the run takes {_estimate(config)}, and activations "
        f"grow with the batch. Each of these changes saves memory: {'; '.join(changes)}"
    )


def _estimate(config: DictConfig) -> str:
    try:
        memory = estimate(*plan_on_meta(config), plain_of(config.quantization))
    except (MemoryError, RuntimeError, UserError):  # the estimate itself may run out of memory
        return "the memory that `inspect` shows"
    total, base = memory.total / 2**20, memory.weights / 2**20
    return f"{total:,.0f} MiB by the estimate of `inspect` (the base takes {base:,.0f} MiB)"
