"""Names that other tools use for this config's keys and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplus_hydra.config.plain import flat
from loraplus_hydra.config.schema import GROUPS

# Another tool's name of a key -> this config's keys with that meaning.
KEYS: dict[str, tuple[str, ...]] = {
    "lr": ("optimizer.lr",),
    "learning_rate": ("optimizer.lr",),
    "wd": ("optimizer.weight_decay",),
    "rank": ("adapter.r",),
    "lora_r": ("adapter.r",),
    "alpha": ("adapter.lora_alpha",),
    "dropout": ("adapter.lora_dropout",),
    "loraplus_lr_ratio": ("loraplus.ratio",),
    "epochs": ("trainer.num_train_epochs",),
    "num_epochs": ("trainer.num_train_epochs",),
    "steps": ("trainer.max_steps",),
    "batch_size": ("trainer.per_device_train_batch_size",),
    "train_batch_size": ("trainer.per_device_train_batch_size",),
    "grad_accum": ("trainer.gradient_accumulation_steps",),
    "warmup_steps": ("scheduler.num_warmup_steps",),
    "gradient_checkpointing": ("trainer.activation_checkpointing",),
    "max_seq_length": ("task.args.max_length", "task.max_length"),
    "model_name_or_path": ("model.path",),
    "dataset": ("data.train",),
    "train_file": ("data.train",),
    "output_dir": ("hydra.run.dir",),
}
# Another tool's name of an option -> this config's overrides with that meaning.
OPTIONS: dict[tuple[str, str], str] = {
    ("adapter", "qlora"): "adapter=lora quantization=nf4",
    ("quantization", "4bit"): "quantization=nf4",
    ("quantization", "8bit"): "quantization=int8",
}
# Group -> the overrides that come before a path or hub name, for users who typed `group=path`.
PATHS: dict[str, str] = {
    "model": "model=hub model.path=",
    "data": "data=jsonl data.train=",
    "adapter": "adapter=existing adapter.path=",
}


def meant_keys(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return the full keys in `config` (a plain dict) that `name` may mean.

    `name` is the last part of a key, or another tool's name of a key.
    """
    known = {key for key in flat(config) if key.split(".")[0] in GROUPS and not key.startswith("loraplus.rules.")}
    if name in KEYS:
        return [key for key in KEYS[name] if key in known or key.startswith("hydra.")]
    return sorted(key for key in known if key.rpartition(".")[2] == name)


def meant_option(group: str, option: str) -> str:
    """Return the overrides that `group=option` probably means; empty if unknown."""
    if (group, option) in OPTIONS:
        return OPTIONS[group, option]
    return PATHS[group] + option if group in PATHS and ("/" in option or "." in option) else ""
