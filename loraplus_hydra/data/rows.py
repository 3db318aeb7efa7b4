"""The config's `data` group -> rows, and what a row's columns are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union

from loraplus_hydra.config.targets import instantiate
from loraplus_hydra.errors import ConfigErrors, Problem

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from omegaconf import DictConfig

    Rows = Union[Dataset, IterableDataset]  # noqa: UP007  (evaluated by type checkers alone)

COLUMN_SUFFIX = "_column"  # keys that say what the columns are called, read by the task
SPLITS = ("train", "eval")

# Columns of our own loaders, beside those of the file.
ORIGIN = "__origin__"  # where a row stands: "train.jsonl, line 17"
CONTINUES = "__continues__"  # true: the next row goes on with this one's document
CONTINUED = "__continued__"  # true: this row goes on with the document of the one before
OURS = (ORIGIN, CONTINUES, CONTINUED)


def loader_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without the `*_column` keys: what its `_target_` is called with."""
    return {str(key): data[key] for key in data if not str(key).endswith(COLUMN_SUFFIX)}


def load_rows(data: DictConfig) -> DatasetDict:
    """Call `data._target_`; raises ConfigErrors when it doesn't return a DatasetDict with "train" and "eval" rows.

    The training rows are a Dataset, or an IterableDataset when they are streamed.
    """
    from datasets import DatasetDict, IterableDatasetDict

    rows = instantiate(loader_arguments(data))
    if not isinstance(rows, (DatasetDict, IterableDatasetDict)) or not set(SPLITS) <= set(rows):
        found = f"splits {sorted(rows)}" if isinstance(rows, Mapping) else f"a {type(rows).__name__}"
        what = f"{data._target_} returned {found}, not a DatasetDict with 'train' and 'eval'"
        raise ConfigErrors([Problem("data._target_", what)])
    if is_streamed(rows["eval"]):
        fix = "stream the training rows alone"
        raise ConfigErrors(
            [Problem("data", "the rows to evaluate on are streamed, but they are needed as a whole", fix)]
        )
    for split in SPLITS:
        if not is_streamed(rows[split]) and len(rows[split]) == 0:
            raise ConfigErrors([Problem("data", f"there are no rows in '{split}'")])
    return rows


def is_streamed(rows: Rows) -> bool:
    """Whether rows come one by one, so that nobody knows how many there are."""
    from datasets import IterableDataset

    return isinstance(rows, IterableDataset)


def all_columns(rows: Rows) -> list[str]:
    """The names of all columns; of streamed rows those of the first."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows), {}))


def columns(rows: Rows) -> list[str]:
    """The names of the columns that came with the rows, without ours."""
    return [name for name in all_columns(rows) if name not in OURS]
