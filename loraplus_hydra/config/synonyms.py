"""Names that other tools use for this config's keys and options."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from loraplus_hydra.config.locations import options_of
from loraplus_hydra.config.plain import flat
from loraplus_hydra.config.schema import GROUPS

# The last part of a key, as people type it -> the keys that may be meant. A key with a plus is in no YAML.
KEYS: dict[str, tuple[str, ...]] = {
    "lr": ("optimizer.lr",),
    "learning_rate": ("optimizer.lr",),
    "wd": ("optimizer.weight_decay",),
    "adam_epsilon": ("optimizer.eps",),
    "rank": ("adapter.r",),
    "lora_r": ("adapter.r",),
    "lora_rank": ("adapter.r",),
    "alpha": ("adapter.lora_alpha",),
    "dropout": ("adapter.lora_dropout",),
    "lora_target": ("adapter.target_modules",),
    "lora_target_modules": ("adapter.target_modules",),
    "lora_modules_to_save": ("+adapter.modules_to_save",),
    "modules_to_save": ("+adapter.modules_to_save",),
    "additional_target": ("+adapter.modules_to_save",),
    "lora_layers_to_transform": ("+adapter.layers_to_transform",),
    "loraplus_lr_ratio": ("loraplus.ratio",),
    "loraplus_lr_embedding": ("loraplus.lr_embedding",),
    "lora_plus_ratio": ("loraplus.ratio",),
    "epoch": ("trainer.num_train_epochs",),
    "epochs": ("trainer.num_train_epochs",),
    "num_epochs": ("trainer.num_train_epochs",),
    "steps": ("trainer.max_steps",),
    "max_train_steps": ("trainer.max_steps",),
    "batch_size": ("trainer.per_device_train_batch_size",),
    "micro_batch_size": ("trainer.per_device_train_batch_size",),
    "train_batch_size": ("trainer.per_device_train_batch_size",),
    "eval_batch_size": ("trainer.per_device_eval_batch_size",),
    "grad_accum": ("trainer.gradient_accumulation_steps",),
    "gradient_accumulation": ("trainer.gradient_accumulation_steps",),
    "grad_clip": ("trainer.max_grad_norm",),
    "max_norm": ("trainer.max_grad_norm",),
    "warmup_steps": ("scheduler.num_warmup_steps",),
    "warmup": ("scheduler.num_warmup_steps",),
    "gradient_checkpointing": ("trainer.activation_checkpointing",),
    "evaluation_strategy": ("trainer.eval_strategy",),
    "num_workers": ("trainer.dataloader_num_workers",),
    "load_best_model_at_end": ("+trainer.load_best_model_at_end",),
    "neftune_noise_alpha": ("+trainer.neftune_noise_alpha",),
    "label_smoothing_factor": ("+trainer.label_smoothing_factor",),
    "tf32": ("+trainer.tf32",),
    "max_seq_length": ("task.args.max_length", "task.max_length", "task.block_size"),
    "max_seq_len": ("task.args.max_length", "task.max_length", "task.block_size"),
    "sequence_len": ("task.args.max_length", "task.max_length", "task.block_size"),
    "seq_length": ("task.args.max_length", "task.max_length", "task.block_size"),
    "cutoff_len": ("task.args.max_length", "task.max_length", "task.block_size"),
    "max_length": ("task.args.max_length", "task.max_length", "task.block_size"),
    "block_size": ("task.block_size", "task.args.max_length", "task.max_length"),
    "sample_packing": ("task.args.packing",),
    "name": ("model.path",),
    "file": ("data.train",),
    "files": ("data.train",),
    "template": ("+task.args.chat_template_path",),
    "chat_template": ("+task.args.chat_template_path",),
    "chat_template_path": ("+task.args.chat_template_path",),
    "metric_for_best_model": ("task.metric",),
    "val_set_size": ("data.eval_fraction",),
    "val_size": ("data.eval_fraction",),
    "validation_file": ("data.eval",),
    "eval_dataset": ("data.eval",),
    "test_dataset": ("data.eval",),
    "dataset_text_field": ("data.text_column",),
    "text_field": ("data.text_column",),
    "label_field": ("data.label_column",),
    "torch_dtype": ("model.dtype",),
    "attn_implementation": ("model.attention",),
    "flash_attn": ("model.attention",),
    "tokenizer_name": ("model.tokenizer",),
    "tokenizer_name_or_path": ("model.tokenizer",),
    "special_tokens": ("model.add_tokens",),
    "new_tokens": ("model.add_tokens",),
    "random_seed": ("seed",),
    "manual_seed": ("seed",),
    "output_dir": ("hydra.run.dir",),
    "out_dir": ("hydra.run.dir",),
    "output": ("hydra.run.dir",),
    "save_dir": ("hydra.run.dir",),
    "logging_dir": ("hydra.run.dir",),
    "run_name": ("hydra.run.dir",),
    "resume": ("trainer.resume_from_checkpoint",),
}
# A key whose value chooses an option -> the group of that option.
CHOICES: dict[str, str] = {
    **dict.fromkeys(("base_model", "model_name", "model_id", "model_name_or_path", "pretrained_model"), "model"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_path", "data_path", "train_file"), "data"),
    **dict.fromkeys(("train_dataset", "train_data"), "data"),
    **dict.fromkeys(("adapter_name_or_path", "adapter_path", "lora_model_dir", "peft_model_id"), "adapter"),
    **dict.fromkeys(("finetuning_type", "peft_type"), "adapter"),
    **dict.fromkeys(("optim", "optimizer_type", "optimizer_name"), "optimizer"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "lr_schedule", "schedule"), "scheduler"),
    **dict.fromkeys(("report_to", "log_with", "tracker"), "logger"),
    **dict.fromkeys(("stage", "task_type"), "task"),
    "device": "trainer",
    **dict.fromkeys(("quantization_bit", "quantize", "bits"), "quantization"),
}
# A setting of another tool -> the overrides that are meant, unless it is off; {} is its value.
SWITCHES: dict[str, str] = {
    "load_in_4bit": "quantization=nf4",
    "load_in_8bit": "quantization=int8",
    "use_dora": "adapter=dora",
    "peft_use_dora": "adapter=dora",
    "use_rslora": "adapter=rslora",
    "peft_use_rslora": "adapter=rslora",
    "pissa_init": "adapter=pissa",
    "lora_target_linear": "adapter.target_modules=all-linear",
    "adam_beta1": "optimizer.betas=[0.9,0.999]",
    "adam_beta2": "optimizer.betas=[0.9,0.999]",
    "group_by_length": "+trainer.train_sampling_strategy=group_by_length",
    "num_labels": "task=classification",
    "flash_attention": "model.attention=flash_attention_2",
    "use_cuda": "trainer=gpu",
    "no_cuda": "trainer=cpu",
    "cpu": "trainer=cpu",
    "wandb": "logger=wandb",
    "use_wandb": "logger=wandb",
    "wandb_project": "logger=wandb logger.project={}",
}
# A key's value in another tool -> its value here.
VALUES: dict[tuple[str, str], str] = {
    **dict.fromkeys((("adapter.target_modules", name) for name in ("all", "all_linear")), "all-linear"),
}
# An option that a group doesn't have -> the overrides that are meant.
OPTIONS: dict[tuple[str, str], str] = {
    ("adapter", "qlora"): "adapter=lora quantization=nf4",
    ("adapter", "lora+"): "adapter=lora loraplus=default",
    ("adapter", "loraplus"): "adapter=lora loraplus=default",
    **dict.fromkeys((("quantization", name) for name in ("4", "4bit", "bnb", "bnb_4bit", "int4")), "quantization=nf4"),
    **dict.fromkeys((("quantization", name) for name in ("8", "8bit", "bnb_8bit")), "quantization=int8"),
    **dict.fromkeys(
        (("optimizer", name) for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf")), "optimizer=adamw"
    ),
    **dict.fromkeys((("optimizer", name) for name in ("adamw_8bit", "adamw_bnb_8bit")), "optimizer=adamw8bit"),
    ("optimizer", "paged_adamw_8bit"): "optimizer=paged_adamw8bit",
    ("optimizer", "paged_adamw_32bit"): "optimizer=paged_adamw32bit",
    ("optimizer", "paged_adamw"): "optimizer=paged_adamw32bit",
    ("optimizer", "lion_8bit"): "optimizer=lion8bit",
    ("scheduler", "warmup_stable_decay"): "scheduler=wsd",
    ("scheduler", "linear_with_warmup"): "scheduler=linear",
    ("scheduler", "cosine_with_warmup"): "scheduler=cosine",
    ("logger", "tb"): "logger=tensorboard",
    **dict.fromkeys((("task", name) for name in ("SEQ_CLS", "cls", "seq_cls")), "task=classification"),
    **dict.fromkeys((("task", name) for name in ("CAUSAL_LM", "causal_lm", "chat", "instruction")), "task=sft"),
    **dict.fromkeys((("task", name) for name in ("pt", "pretrain", "clm", "completion")), "task=text data=text"),
    ("task", "kto"): "experiment=kto",
    ("task", "orpo"): "experiment=orpo",
    ("data", "json"): "data=jsonl",
    **dict.fromkeys((("trainer", name) for name in ("cuda", "gpus", "single_gpu")), "trainer=gpu"),
    ("trainer", "fsdp"): "trainer=fsdp2",
    ("loraplus", "true"): "loraplus=default",
    ("loraplus", "false"): "loraplus=none",
}
# A group whose option may have been given as a path or a hub's name -> the overrides, up to that path.
PATHS: dict[str, str] = {"model": "model=hub model.path=", "adapter": "adapter=existing adapter.path="}
# A group whose option may have been given as a number -> the override, up to that number.
NUMBERS: dict[str, str] = {"loraplus": "loraplus.ratio=", "optimizer": "optimizer.lr=", "adapter": "adapter.r="}
# The suffix of a file of rows -> the overrides that read it, up to its name.
SUFFIXES: dict[str, str] = {
    **dict.fromkeys((".csv", ".tsv"), "data=csv data.train="),
    **dict.fromkeys((".parquet", ".arrow"), "data=parquet data.train="),
    **dict.fromkeys((".txt", ".text", ".md"), "task=text data=text data.train="),
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "data=jsonl data.train="),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_NUMBER = re.compile(r"\d[\d.e+-]*")
_OFF = ("false", "no", "none", "null", "0", "off")


def meant_keys(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return the full keys in `config` (a plain dict) that `name` may mean.

    `name` is the last part of a key, or another tool's name of a key. A key that the YAML files don't list gets a plus.
    """
    known = {key for key in flat(config) if key.split(".")[0] in (*GROUPS, "seed")}
    known = {key for key in known if not key.startswith("loraplus.rules.")}
    if name in KEYS:
        # If the config has none of them, the first is named, because another option of its group has it.
        return [key for key in KEYS[name] if key in known or key.startswith(("hydra.", "+"))] or [KEYS[name][0]]
    return sorted(key for key in known if key.rpartition(".")[2] == name)


def own_name(name: str, group: str) -> str:
    """Return the option or key of `group` that other tools call `name`, or `name` itself."""
    keys = [key for key in KEYS.get(name, ()) if key.startswith(f"{group}.")]
    return keys[0].rpartition(".")[2] if keys else name


def meant_overrides(name: str, value: str, config: Mapping[str, Any]) -> str:
    """Return the overrides that `name=value` probably means in a plain `config`; empty if unknown."""
    name = name.lower().replace("-", "_")
    if name in SWITCHES:
        return "" if value.lower() in _OFF else SWITCHES[name].replace("{}", value)
    if (group := CHOICES.get(name)) is not None:
        options = options_of(group)
        if value.lower() in options:
            return f"{group}={value.lower()}"
        return meant_option(group, value) or f"{group}=OPTION (one of: {', '.join(options)})"
    return " or ".join(f"{key}={VALUES.get((key, value), value)}" for key in meant_keys(name, config))


def meant_option(group: str, option: str) -> str:
    """Return the overrides that are meant by `group=option`; empty where nothing is known."""
    if (group, option) in OPTIONS:
        return OPTIONS[group, option]
    if group in NUMBERS and _NUMBER.fullmatch(option):
        return NUMBERS[group] + option
    if group == "data":
        return _meant_rows(option)
    if group not in PATHS or not ("/" in option or os.path.exists(option)):  # noqa: PTH110 - False for names that are too long
        return ""
    return PATHS[group] + option


def _meant_rows(name: str) -> str:
    """Return the overrides that read `name`, a file of rows or a hub's data set; empty for other names."""
    path = PurePath(name)
    suffix = PurePath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix in SUFFIXES:
        return SUFFIXES[suffix] + name
    return f"data=hub data.name={name}" if "/" in name else ""
