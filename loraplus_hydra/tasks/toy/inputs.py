"""The student's rows. Each row has all inputs, so every step uses all inputs."""

from __future__ import annotations

from datasets import Dataset, DatasetDict
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase, default_data_collator

from loraplus_hydra.errors import Problem, refuse
from loraplus_hydra.tasks.examples import Examples

_WIDEST = 2048  # number of rows of the student's tables, equal to the size of the tokenizer's vocabulary


def load(width: int = 256, rank: int = 4, steps: int = 100, seed: int = 0) -> DatasetDict:
    """Return `steps` training rows and one row for evaluation.

    Each row has the numbers of all inputs. `rank` and `seed` are for the model; `examples` passes them on. Raises
    ConfigErrors for values out of range.
    """
    problems = []
    if not 1 < width <= _WIDEST:
        problems.append(Problem("data.width", f"{width} is out of range", f"set it from 2 to {_WIDEST}"))
    elif not 0 < rank <= width:
        problems.append(Problem("data.rank", f"{rank} is out of range", f"set it from 1 to the width, {width}"))
    if steps < 1:
        problems.append(Problem("data.steps", f"{steps} is out of range", "set 1 or more"))
    refuse(problems)
    row = {"input_ids": list(range(width))}
    return DatasetDict({"train": Dataset.from_list([row] * steps), "eval": Dataset.from_list([row])})


def examples(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: DictConfig, data: DictConfig) -> Examples:
    """Return the rows, and the width, rank and seed for the model's config."""
    return Examples(
        train=rows["train"].with_format("torch"),
        eval=rows["eval"].with_format("torch"),
        trainer_arguments={"data_collator": default_data_collator},  # the default collator would pad with the tokenizer
        model_arguments={name: data[name] for name in ("width", "rank", "seed")},
    )
