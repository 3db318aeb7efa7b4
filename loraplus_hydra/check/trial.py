"""A trial of the Trainer's arguments: an evaluation and a step of a tiny model on a few rows.

Some arguments fail only when the Trainer is made, or in its first step. The arguments in the YAML files have ranges, so
only other arguments are tried.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from omegaconf import DictConfig, OmegaConf, open_dict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, LlamaConfig

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import Problem, first_line
from loraplus_hydra.io.processes import world_size
from loraplus_hydra.models.properties import is_classifier
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.training.hf_trainer.assemble import training_arguments
from loraplus_hydra.training.hf_trainer.callbacks import remove_own_printing
from loraplus_hydra.training.hf_trainer.step_memory import KNOWN
from loraplus_hydra.training.hf_trainer.temporary import temporary_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 4
# Only one short step, and no compilation: it takes a minute, and its names are checked elsewhere.
_SHORT: dict[str, Any] = {
    "max_steps": 1,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "no",
    "torch_compile": False,
}
_LEFT_OUT = ("load_best_model_at_end", "torch_compile_backend", "torch_compile_mode")
_AT_MOST = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 1,
}
_CHANGEABLE = ("_target_", "auto_class", "metric")
_PLACES = ("trainer", "task.args")


def trial_problems(config: DictConfig, examples: Examples) -> list[Problem]:
    """Return a Problem for each argument with which the Trainer can't train a tiny model."""
    keys = list(_unlisted_keys(config))
    if not keys or world_size() > 1 or config.task._target_.partition(".")[0] not in KNOWN:
        return []
    tokenizer = load_tokenizer(config.model)
    if not (reason := _failure(config, tokenizer, examples)):
        return []
    if _failure(_without(config, keys), tokenizer, examples):  # the error is due to the rows or the tiny model
        return []
    alone = {
        key: _failure(_without(config, [each for each in keys if each != key]), tokenizer, examples) for key in keys
    }
    trainer = config.task._target_.rpartition(".")[2]
    found = [
        Problem(key, f"{trainer} can't train with this argument: {why}", "remove it")
        for key, why in alone.items()
        if why
    ]
    return found or [
        Problem(", ".join(keys), f"{trainer} can't train with these arguments together: {reason}", "remove one of them")
    ]


def _unlisted_keys(config: DictConfig) -> Iterator[str]:
    """Yield the Trainer's arguments and the task's keys that differ from this program's YAML files."""
    listed = {str(key) for key in _yaml("trainer/default.yaml")}
    for each in _tasks():
        listed |= each.get("args", {}).keys()
    if (task := _task_of(config)) and not is_classifier(config):  # a classifier's metrics are known
        yield from (f"task.{key}" for key in _CHANGEABLE if config.task[key] != task[key])
    for place in _PLACES:
        for key, value in OmegaConf.select(config, place).items():
            if key not in listed and value is not None:
                yield f"{place}.{key}"


def _task_of(config: DictConfig) -> dict[str, Any]:
    """Return the YAML of the task with the config's `examples` function; empty for a user's own task."""
    return next((task for task in _tasks() if task["examples"] == config.task.examples), {})


def _tasks() -> list[dict[str, Any]]:
    return [_yaml(f"task/{file.name}") for file in sorted((config_folder() / "task").glob("*.yaml"))]


@cache
def _yaml(name: str) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / name))
    return {str(key): value for key, value in plain.items()}


def _without(config: DictConfig, keys: list[str]) -> DictConfig:
    shorter = config.copy()
    for key in keys:
        place, _, name = key.rpartition(".")
        if place == "task":
            shorter.task[name] = _task_of(config)[name]
        else:
            del OmegaConf.select(shorter, place)[name]
    return shorter


def _failure(config: DictConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> str:
    """Return the Trainer's error with the tiny model; empty if training works."""
    with temporary_state(), tempfile.TemporaryDirectory() as folder:
        try:
            trainer = locate(config.task._target_)(
                model=_stand_in(config, tokenizer, examples),
                args=training_arguments(_shortened(config), Path(folder), examples),
                train_dataset=_few(examples.train),
                eval_dataset=_few(examples.eval),
                processing_class=tokenizer,
                **examples.trainer_arguments,
            )
            remove_own_printing(trainer)
            trainer.train()
        except Exception as error:  # these libraries raise many types
            return str(error.args[0]) if isinstance(error, KeyError) else first_line(error)
    return ""


def _shortened(config: DictConfig) -> DictConfig:
    short = config.copy()
    with open_dict(short):
        for name in _LEFT_OUT:
            short.trainer.pop(name, None)
        short.trainer.update(_SHORT)
        for name, most in _AT_MOST.items():
            short.trainer[name] = min(most, short.trainer.get(name, most))
    return short


def _few(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    return rows.take(_ROWS) if isinstance(rows, IterableDataset) else rows.select(range(min(_ROWS, len(rows))))


def _stand_in(config: DictConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> PeftModel:
    """Return a model with hidden size 8 and an adapter. It fits the tokenizer."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 2**14}
    values = {"pad_token_id": tokenizer.pad_token_id, **examples.model_arguments}
    is_encoder = is_classifier(config) and "token_type_ids" in tokenizer.model_input_names
    architecture = (BertConfig if is_encoder else LlamaConfig)(**sizes, **values)
    model = locate(config.task.auto_class).from_config(architecture)
    return get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", task_type=config.task.task_type))
