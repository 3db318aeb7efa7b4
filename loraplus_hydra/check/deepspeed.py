"""Checks of DeepSpeed's settings."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments

from loraplus_hydra.errors import Problem
from loraplus_hydra.io.processes import world_size
from loraplus_hydra.training.deepspeed_settings import TRAINERS_OWN, complete_settings

_KEY = "trainer.deepspeed"
_MASTERS = {"optimizer": "the optimizer group", "scheduler": "the scheduler group"}
_FROM_ACCELERATE = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE")
# Optimizers whose step depends on a tensor's shape or size. ZeRO joins the tensors of a group into one vector.
_BY_SHAPE = ("Muon", "Adafactor", "LAMB", "LARS")


def deepspeed_problems(trainer: dict[str, Any]) -> list[Problem]:
    """Return a Problem for each setting of DeepSpeed that would replace or change what the config says."""
    given = trainer.get("deepspeed")
    if not given:
        return _of_accelerate()
    problems = []
    if find_spec("deepspeed") is None:
        problems.append(Problem(_KEY, "the package deepspeed isn't installed", "pip install deepspeed"))
    if "RANK" not in os.environ:
        fix = "start it with torchrun --nproc_per_node N -m loraplus_hydra ..., or use trainer=default"
        problems.append(Problem(_KEY, "DeepSpeed needs a launcher, also for one process", fix))
    try:
        settings = complete_settings(given)
    except (OSError, ValueError) as error:
        fix = "use a JSON file with these settings"
        return [*problems, Problem(_KEY, f"it can't be read: {error}", fix)]
    return [*problems, *_replaced(settings), *_different(settings, trainer)]


def joined_tensors_refusal(optimizer: type, arguments: dict[str, Any]) -> str:
    """Return why the optimizer takes other steps on a group's joined tensors; empty if it doesn't."""
    name = optimizer.__name__
    if name.startswith(_BY_SHAPE):
        return f"{name}'s step depends on a tensor's shape, but DeepSpeed joins a group's tensors into one"
    if name.endswith("8bit") or arguments.get("optim_bits") == 8:
        return f"{name} keeps 32-bit state for some tensors, but DeepSpeed joins a group's tensors into one"
    return ""


def _of_accelerate() -> list[Problem]:
    """Return a Problem if only the environment asks for DeepSpeed.

    The config would not say how the run is trained.
    """
    name = next((name for name in _FROM_ACCELERATE if os.environ.get(name, "false").lower() not in ("", "false")), None)
    if name is None:
        return []
    fix = "set trainer=deepspeed or +trainer.deepspeed=FILE, or launch without --use_deepspeed"
    return [Problem(_KEY, f"{name} asks for DeepSpeed, but the config doesn't", fix)]


def _replaced(settings: dict[str, Any]) -> list[Problem]:
    return [
        Problem(_KEY, f"its block '{name}' would replace {master} and LoRA+", f"remove '{name}'")
        for name, master in _MASTERS.items()
        if name in settings
    ]


def _different(settings: dict[str, Any], trainer: dict[str, Any]) -> list[Problem]:
    """Return a Problem for each value that differs from the Trainer's."""
    defaults = {field.name: field.default for field in TrainingArguments.__dataclass_fields__.values()}
    expected = {ds: trainer.get(own, defaults[own]) for ds, own in TRAINERS_OWN.items()}
    names = dict(TRAINERS_OWN)
    micro, accumulation = expected["train_micro_batch_size_per_gpu"], expected["gradient_accumulation_steps"]
    if isinstance(micro, int) and isinstance(accumulation, int):  # otherwise their types are reported
        expected["train_batch_size"] = micro * accumulation * world_size()
        names["train_batch_size"] = "per_device_train_batch_size, of all processes"
    found = dict(settings)
    for kind in ("bf16", "fp16"):
        block = settings.get(kind)
        found[f"{kind}.enabled"] = block.get("enabled", "auto") if isinstance(block, dict) else "auto"
        expected[f"{kind}.enabled"] = bool(trainer.get(kind))
        names[f"{kind}.enabled"] = kind
    return [
        Problem(f"{_KEY}.{key}", f"is {found[key]}, but trainer.{names[key]} is {value}", 'set it to "auto"')
        for key, value in expected.items()
        if found.get(key, "auto") not in ("auto", value)
    ]
