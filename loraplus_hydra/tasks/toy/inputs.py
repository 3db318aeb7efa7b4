"""The student's rows: each has all inputs, so every step takes all of them."""

from __future__ import annotations

from datasets import Dataset, DatasetDict
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase, default_data_collator

from loraplus_hydra.errors import Problem, refuse
from loraplus_hydra.tasks.examples import Examples

_WIDEST = 2048  # rows of the student's tables; the size of the tokenizer's vocabulary


def load(width: int = 256, rank: int = 4, steps: int = 100, seed: int = 0) -> DatasetDict:
    """Return `steps` training rows and one to evaluate on.

    Each has the numbers of all inputs. `rank` and `seed` are the model's, which gets them by `examples`. Raises
    ConfigErrors for values out of range.
    """
    problems = []
    if not 1 < width <= _WIDEST:
        problems.append(Problem("data.width", f"{width} is out of range", f"from 2 to {_WIDEST}"))
    elif not 0 < rank <= width:
        problems.append(Problem("data.rank", f"{rank} is out of range", f"from 1 to the width, {width}"))
    if steps < 1:
        problems.append(Problem("data.steps", f"{steps} is out of range", "1 or more"))
    refuse(problems)
    row = {"input_ids": list(range(width))}
    return DatasetDict({"train": Dataset.from_list([row] * steps), "eval": Dataset.from_list([row])})


def examples(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: DictConfig, data: DictConfig) -> Examples:
    """Return the rows, and the width, rank and seed for the model's config."""
    return Examples(
        train=rows["train"].with_format("torch"),
        eval=rows["eval"].with_format("torch"),
        trainer_arguments={"data_collator": default_data_collator},  # the default pads by the tokenizer
        model_arguments={name: data[name] for name in ("width", "rank", "seed")},
    )
