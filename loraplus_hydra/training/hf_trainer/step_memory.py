"""The peak memory of a training step, from a trace of the run's own Trainer without weights."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.config.schema import ModelConfig
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import first_line
from loraplus_hydra.models.base_model import meta_model
from loraplus_hydra.models.properties import is_classifier
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.base import least
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.training.hf_trainer.answer_ends import with_one_end
from loraplus_hydra.training.hf_trainer.assemble import training_arguments
from loraplus_hydra.training.hf_trainer.temporary import temporary_state
from loraplus_hydra.training.hf_trainer.whole_head import score_with_whole_head
from loraplus_hydra.training.lean.adopt import AUTO, PLAIN, use_lean
from loraplus_hydra.training.live_bytes import LiveBytes
from loraplus_hydra.training.prepare import add_meta_adapter, base_of

# Packages whose Trainers can train any causal model or classifier.
KNOWN = ("transformers", "trl", "loraplus_hydra")
EMBEDDED = "pkg://loraplus_hydra.models/embedded"
_LENGTH = 512  # tokens of a row, if neither task nor model has a limit
_SAMPLE = 2000  # rows of a stream among which the longest ones are searched
# Settings that need an accelerator, or that change only how fast a step is.
_LEFT_OUT = ("torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32", "deepspeed", "fsdp", "fsdp_config")


@dataclass(frozen=True)
class StepMemory:
    """The peak bytes of activations and gradients in a step, with and without recomputed activations."""

    rows: int  # of a batch
    tokens: int | None  # of its longest row; None if the Trainer itself makes the tokens
    kept: int | None = None  # without trainer.activation_checkpointing; None if unknown
    recomputed: int | None = None  # with it
    reason: str = ""  # for the unknown values
    recomputes: bool = False  # trainer.activation_checkpointing

    @property
    def taken(self) -> int | None:
        """The peak with the config's own setting; None if unknown."""
        return self.recomputed if self.recomputes else self.kept

    @property
    def other(self) -> int | None:
        """The peak with the other setting; None if unknown."""
        return self.kept if self.recomputes else self.recomputed


def step_memory(
    config: DictConfig, examples: Examples | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> StepMemory:
    """Estimate the peak memory of a step on the longest rows of `examples`.

    Without examples, all rows have the largest length that the config allows.
    """
    rows = int(config.trainer.get("per_device_train_batch_size", 8))
    if config.task._target_.partition(".")[0] not in KNOWN:
        return StepMemory(rows, None, reason=f"{config.task._target_} is no Trainer that can be traced")
    if examples is None or tokenizer is None:
        if any(name in config.task._target_ for name in ("DPO", "KTO")):
            return StepMemory(rows, None, reason="the rows of this task have no tokens yet; `check` reads them")
        tokenizer = load_tokenizer(OmegaConf.structured(ModelConfig(path=EMBEDDED)))
        examples = _full_rows(config, rows)
    sizes: list[int | None] = []
    reason = ""
    for recompute in (False, True):
        variant = config.copy()
        with open_dict(variant):
            variant.trainer.activation_checkpointing = recompute
        try:
            sizes.append(step_bytes(variant, tokenizer, examples))
        except Exception as error:  # a model's own code can fail in many ways without weights
            sizes.append(None)
            reason = first_line(error)
    recomputes = bool(config.trainer.get("activation_checkpointing"))
    return StepMemory(rows, _tokens(examples.train), sizes[0], sizes[1], reason, recomputes)


def _full_rows(config: DictConfig, rows: int) -> Examples:
    """Return rows of the largest length that the config allows."""
    task = config.task
    wanted = (task.args.get("max_length"), task.get("max_length"), task.get("block_size"))
    length = least(*wanted, base_of(config).positions) or _LENGTH
    row: dict[str, Any] = {"input_ids": [1] * length}
    row |= {"attention_mask": [1] * length, "labels": 0} if is_classifier(config) else {"labels": [1] * length}
    made = Dataset.from_list([row] * rows)
    return Examples(made, made)


def step_bytes(config: DictConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> int:
    """Return the peak bytes of activations and gradients in a step on the longest rows.

    The step is that of one process on a CPU, so a GPU's kernels may need a little more or less. A quantised base is
    traced as if it were not quantised.
    """
    short = _for_trace(config)
    model: Any = add_meta_adapter(meta_model(config.model, config.task.auto_class, examples.model_arguments), config)
    rows = short.trainer.get("per_device_train_batch_size", 8)
    with temporary_state(), tempfile.TemporaryDirectory() as folder:
        live = LiveBytes(model)
        longest = longest_rows(examples.train, rows, tokens=packed_to(short))
        trainer: Any = with_one_end(locate(short.task._target_))(
            model=model,
            args=training_arguments(short, Path(folder), examples),
            train_dataset=longest,
            processing_class=tokenizer,
            **examples.trainer_arguments,
        )
        score_with_whole_head(model)
        use_lean(trainer, short.trainer.get("forward", "plain"), compare=False)
        if trainer.args.activation_checkpointing:
            model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as `train` sets it
        prepared = trainer.accelerator.prepare_model(model)
        # Of several batches, the second has the first's gradients in memory, too; the others add nothing
        batches = iter([next(iter(trainer.get_train_dataloader()))] * min(2, short.trainer.gradient_accumulation_steps))
        batches, items = trainer.get_batch_samples(batches, 2, trainer.args.device)
        with live:
            for batch in batches:
                trainer.training_step(prepared, dict(batch), items)
    return live.peak


def _for_trace(config: DictConfig) -> DictConfig:
    """Return the config with a Trainer that has one process, on the CPU."""
    short = config.copy()
    on_gpu = torch.accelerator.is_available() and not short.trainer.get("use_cpu")
    with open_dict(short):
        for name in _LEFT_OUT:
            short.trainer.pop(name, None)
        # A CPU has no autocast to float16 in accelerate; bfloat16 has the same size
        short.trainer.update(
            use_cpu=True, bf16=bool(short.trainer.get("bf16") or short.trainer.get("fp16")), fp16=False
        )
        if on_gpu and short.trainer.get("forward") == AUTO:  # as `reason_against_auto` decides there
            short.trainer.forward = PLAIN
        short.trainer.update(eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    return short


def packed_to(config: DictConfig) -> int:
    """Return the number of tokens to which TRL packs rows; 0 if it doesn't."""
    return int(config.task.args.get("max_length") or 0) if config.task.args.get("packing") else 0


def longest_rows(rows: Dataset | IterableDataset, count: int, *, tokens: int) -> Dataset:
    """Return the `count` longest rows, repeated if there are fewer.

    Rows that are packed to so many `tokens` are enough for `count` packed rows.
    """
    some = Dataset.from_list(list(rows.take(_SAMPLE))) if isinstance(rows, IterableDataset) else rows
    sizes = [size for table in some.with_format("arrow").iter(1000) for size in _sizes(table)]
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:count]
    needed = count if not tokens else 2 * count * max(1, tokens // max(1, sizes[order[-1]]))
    return some.select([order[place % len(order)] for place in range(needed)])


def _tokens(rows: Dataset | IterableDataset) -> int | None:
    """Return the number of tokens of the longest row; None for rows of text."""
    longest = longest_rows(rows, 1, tokens=0)[0].get("input_ids")
    return None if longest is None else len(longest)


def _sizes(table: Any) -> list[int]:
    """Return the number of tokens of each row of an Arrow table, or of characters if the rows are text."""
    if "input_ids" in table.column_names:
        sizes: list[int] = pyarrow.compute.list_value_length(table["input_ids"]).to_pylist()
        return sizes
    return [len(json.dumps(row, default=str)) for row in table.to_pylist()]
