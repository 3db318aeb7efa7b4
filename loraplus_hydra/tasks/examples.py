"""Examples that a task makes from rows, loaded once for the check and the run.

A task is a function, which `task.examples` names. Your own task looks like this:

    def examples(
        rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: DictConfig, data: DictConfig, *, width: int = 80
    ) -> Examples:
        ...

The first four are passed by position: the rows with the splits "train" and "eval", the model's tokenizer, and the two
config groups. Every other key of the `task` group, which is not a field of `TaskConfig`, is passed by name: here
`task.width`. Such keys are checked against the function's parameters and their types. An optional parameter `base: Base
| None = None` gets the properties of the weights, such as the labels of a trained head. The return annotation is
required. An optional function `config_problems(config)` in the same module checks the whole config, given as plain
containers. It returns a list of `Problem`.
"""

from __future__ import annotations

import glob
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.config.identity import config_hash
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.config.schema import TaskConfig
from loraplus_hydra.config.targets import locate
from loraplus_hydra.data.fingerprint import RowsRead, fingerprints, watched
from loraplus_hydra.data.rows import is_streamed, load_rows
from loraplus_hydra.tasks.base import Base

BASE = "base"  # name of the optional parameter of a task's function for a Base


@dataclass(frozen=True)
class Examples:
    """The examples for the task's Trainer, and held-out rows for samples."""

    train: Dataset | IterableDataset
    eval: Dataset
    prompts: tuple[str, ...] = ()  # held-out prompts as text
    rendered: tuple[str, ...] = ()  # these prompts as the model sees them
    max_length: int | None = None  # argument of the Trainer, if it is smaller than the one in `task.args`
    # True if the tokenizer adds special tokens to `rendered`; None: if it has no chat template
    special_tokens: bool | None = None
    references: tuple[str, ...] = ()  # the rows' answers
    trainer_arguments: dict[str, Any] = field(default_factory=dict)  # other arguments of the Trainer
    model_arguments: dict[str, Any] = field(default_factory=dict)  # attributes of the model's config: num_labels, ...
    notes: tuple[str, ...] = ()  # notes for the user, for example the number of rows that are cut
    # Set by `load_examples`:
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the rows, by split
    rows_read: RowsRead | None = None  # the streamed training rows that were read

    def counts(self) -> str:
        """Return the numbers of examples as text."""
        train = "a stream of examples" if is_streamed(self.train) else f"{len(self.train):,} examples"
        same = self.fingerprints.get("data.train") == self.fingerprints.get("data.eval", "")
        return f"{train} for training, {len(self.eval):,} for evaluation" + (" (the same rows)" if same else "")


_MOST_FILES = 10_000  # of a folder; their times tell whether it has changed
# Examples that a check has made for the following run, by config; at most one entry.
_kept: dict[str, Examples] = {}


def load_examples(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, base: Base | None = None, *, keep: bool = False
) -> Examples:
    """Load the config's rows and return their examples.

    The examples must fit the base model; `base` has the properties of its weights. With `keep`, the examples are cached
    for the next call with the same config. Raises ConfigErrors.
    """
    key = _key(config)
    examples = _kept.pop(key, None)
    if examples is None:
        _kept.clear()
        own: Any = own_arguments(OmegaConf.to_container(config.task, resolve=True))  # type: ignore[arg-type]
        function = locate(config.task.examples)
        if BASE in inspect.signature(function).parameters:
            own[BASE] = base or Base()
        rows, rows_read = watched(load_rows(config.data))
        examples = function(rows, tokenizer, config.task, config.data, **own)
        examples = replace(examples, fingerprints=fingerprints(rows), rows_read=rows_read)
    if keep:
        _kept[key] = examples
    return examples


def own_arguments(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the `task` group that are parameters of the `examples` function."""
    common = {each.name for each in fields(TaskConfig)}
    return {str(key): value for key, value in task.items() if key not in common}


def _key(config: DictConfig) -> str:
    groups = {name: OmegaConf.to_container(config[name], resolve=True) for name in ("model", "task", "data")}
    # In a notebook, a file can change between the check and the run.
    return config_hash({**groups, "files": [*_stamps(groups["model"]), *_stamps(groups["data"])]})


def _stamps(value: Any) -> Iterator[list[Any]]:
    """Yield path, size and time of each file that a value names: as its path, its folder or by a pattern."""
    if isinstance(value, (Mapping, list)):
        for item in [*value.keys(), *value.values()] if isinstance(value, Mapping) else value:
            yield from _stamps(item)
    elif isinstance(value, str) and value:
        for file in _files(value):
            with suppress(OSError):  # a link without a target
                stat = file.stat()
                yield [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _files(text: str) -> Iterator[Path]:
    """Yield the files that a text names; none for text that is no path."""
    with suppress(OSError, ValueError):
        path = expanded(text)
        for found in [path] if path.exists() else map(Path, glob.iglob(str(path))):  # a name may have brackets
            yield from islice(found.rglob("*"), _MOST_FILES) if found.is_dir() else [found]
