"""The student's rows: each is all inputs at once, so that a step sees them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.examples import Examples

if TYPE_CHECKING:
    from datasets import DatasetDict
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

_WIDEST = 2048  # rows of the student's tables: the tokenizer's vocabulary


def load(width: int = 256, rank: int = 4, steps: int = 100, seed: int = 0) -> DatasetDict:
    """`steps` training rows and one to evaluate on, all the same: the numbers of all inputs. Raises ConfigErrors."""
    from datasets import Dataset, DatasetDict

    problems = []
    if not 1 < width <= _WIDEST:
        problems.append(Problem("data.width", f"{width} is out of range", f"from 2 to {_WIDEST}"))
    elif not 0 < rank <= width:
        problems.append(Problem("data.rank", f"{rank} is out of range", f"from 1 to the width, {width}"))
    if steps < 1:
        problems.append(Problem("data.steps", f"{steps} is out of range", "1 or more"))
    if problems:
        raise ConfigErrors(problems)
    row = {"input_ids": list(range(width))}
    return DatasetDict({"train": Dataset.from_list([row] * steps), "eval": Dataset.from_list([row])})


def examples(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: DictConfig, data: DictConfig) -> Examples:
    """The rows as they are; the model's width, rank and seed are theirs."""
    from transformers import default_data_collator

    return Examples(
        train=rows["train"].with_format("torch"),
        eval=rows["eval"].with_format("torch"),
        trainer_arguments={"data_collator": default_data_collator},  # the tokenizer's would pad
        model_arguments={name: data[name] for name in ("width", "rank", "seed")},
    )
