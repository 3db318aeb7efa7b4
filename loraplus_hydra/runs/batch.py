"""The search for the largest batch that fits the memory, for `trainer.auto_batch`."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.check import Checked
from loraplus_hydra.config.identity import ROWS
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import files, interrupts, run_folder, screen
from loraplus_hydra.loraplus.memory import estimate
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.limits import MachineLimitError
from loraplus_hydra.runs.trial import OUT_OF_MEMORY
from loraplus_hydra.training.hf_trainer.step_memory import step_bytes
from loraplus_hydra.training.measure import available_memory_bytes
from loraplus_hydra.training.prepare import prepare_examples


def fit_batch(checked: Checked, folder: Path) -> DictConfig:
    """Return the config with the largest batch that fits, and as many rows a step as before.

    A run in `folder` that has found its batch before keeps it, because another one would give other rounding errors.
    Each batch is tried in a new process, which may run out of memory. Raises UserError.
    """
    config = checked.config
    rows = _rows(config)
    if (stored := _stored(folder)) is not None and _rows(stored) == rows:
        return _with_batch(config, stored.trainer.per_device_train_batch_size)
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    need, reason = _estimate(checked), ""
    on_gpu = torch.cuda.is_available() and not config.trainer.get("use_cpu")
    # The estimate is for a CPU's kernels. On a GPU, running out of memory ends only the trial
    slack = 2 if on_gpu else 1
    for size in sizes:
        interrupts.stop_if_asked()
        candidate = _with_batch(config, size)
        # Without the estimate, a control group's limit would end the trial, and perhaps this process
        free = available_memory_bytes(on_gpu=on_gpu)
        if need is not None and free is not None and need(size) > slack * free:
            reason = f"{size} rows need about {need(size) / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free"
        elif _fits(candidate):
            _report(size, rows, reason, sizes)
            return candidate
        else:
            reason = f"two steps with batches of {size} rows ran out of memory"
    raise MachineLimitError(
        f"trainer.auto_batch: not even one row fits the memory: {reason}. These settings save memory: "
        "trainer.activation_checkpointing=true, quantization=nf4, optimizer=adamw8bit, shorter rows"
    )


def _estimate(checked: Checked) -> Callable[[int], float] | None:
    """Return the bytes of training as a function of the batch's rows; None if they can't be estimated."""
    config = checked.config
    memory = estimate(checked.model, checked.plan, plain_of(config.quantization))
    tokenizer = load_tokenizer(config.model)
    examples = prepare_examples(config, tokenizer, keep=True)
    try:
        one, two = (step_bytes(_with_batch(config, size), tokenizer, examples) for size in (1, 2))
    except Exception:  # a model's own code can fail in many ways without weights; the trials then decide alone
        return None
    fixed = memory.total - memory.gradients
    return lambda size: fixed + max(memory.gradients, one + (size - 1) * (two - one))


def _rows(config: Any) -> int:
    """Return the rows of an optimizer step."""
    per_batch, batches = (int(config.trainer[name]) for name in ROWS)
    return per_batch * batches


def _stored(folder: Path) -> Any:
    """Return the stored config of a run that has found its batch in this folder; None without one."""
    file = folder / run_folder.CONFIG
    stored: Any = OmegaConf.load(file) if file.is_file() else None
    return stored if stored is not None and OmegaConf.select(stored, "trainer.auto_batch") else None


def _with_batch(config: DictConfig, size: int) -> DictConfig:
    changed = config.copy()
    changed.trainer.update(dict(zip(ROWS, (size, _rows(config) // size), strict=True)))
    return changed


def _fits(config: DictConfig) -> bool:
    """Return True if two steps on the longest rows don't run out of memory, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "config.yaml"
        files.write_text(file, OmegaConf.to_yaml(config, resolve=True))
        command = [sys.executable, "-m", "loraplus_hydra.runs.trial", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    interrupts.stop_if_asked()  # Ctrl-C has ended the trial, too
    if done.returncode in (OUT_OF_MEMORY, -signal.SIGKILL):  # the system kills a process that takes too much
        return False
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise UserError(f"trainer.auto_batch: the trial of a batch failed: {lines[-1]}")
    return True


def _report(size: int, rows: int, reason: str, sizes: list[int]) -> None:
    screen.show(f"    Batch: {size} x {rows // size} batches = {rows} rows a step (trainer.auto_batch)")
    if reason:
        screen.show(f"    Not more, because {reason}")
        larger = sizes[sizes.index(size) - 1]
        if larger > 2 * size:
            screen.show(f"    {rows} rows can't be divided into equal batches of {size + 1} to {larger - 1} rows")
