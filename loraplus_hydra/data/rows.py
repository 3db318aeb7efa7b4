"""Rows of the config's `data` group, and the names of their columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List
from omegaconf import DictConfig

from loraplus_hydra.config.schema import COLUMN_SUFFIX
from loraplus_hydra.config.targets import instantiate
from loraplus_hydra.data.exact_json import ExactJson
from loraplus_hydra.errors import ConfigErrors, Problem, UserError

Rows: TypeAlias = Dataset | IterableDataset

SPLITS = ("train", "eval")

# Columns that this program's loaders add to the file's columns.
ORIGIN = "__origin__"  # the row's place in its source: "train.jsonl, line 17"
CONTINUES = "__continues__"  # true: the next row continues this row's document
CONTINUED = "__continued__"  # true: this row continues the previous row's document
OURS = (ORIGIN, CONTINUES, CONTINUED)

_FIRST = 1000  # number of a stream's first rows that are read to find its columns


def loader_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` without the `*_column` keys: the `_target_` and its arguments."""
    return {str(key): data[key] for key in data if not str(key).endswith(COLUMN_SUFFIX)}


def load_rows(data: DictConfig) -> DatasetDict:
    """Call `data._target_` and return its "train" and "eval" rows.

    The training rows are a Dataset, or an IterableDataset if they are streamed. Raises ConfigErrors if the callable
    returns anything else, or a split without rows.
    """
    rows = instantiate(loader_arguments(data))
    if not isinstance(rows, (DatasetDict, IterableDatasetDict)) or not set(SPLITS) <= set(rows):
        returned = f"splits {sorted(rows)}" if isinstance(rows, Mapping) else f"a {type(rows).__name__}"
        what = f"{data._target_} returned {returned}, not a DatasetDict with 'train' and 'eval'"
        raise ConfigErrors([Problem("data._target_", what)])
    if is_streamed(rows["eval"]):
        what = "the rows for evaluation are streamed, but an evaluation needs all rows"
        raise ConfigErrors([Problem("data", what, "stream only the training rows")])
    for split in SPLITS:
        if not is_streamed(rows[split]) and len(rows[split]) == 0:
            raise ConfigErrors([Problem("data", f"there are no rows in '{split}'")])
    if is_streamed(rows["train"]) and rows["train"].column_names is None:
        rows["train"] = with_columns(rows["train"], first_columns(rows["train"]))
    return rows


def is_streamed(rows: Rows) -> bool:
    """Return True for streamed rows, whose number is unknown."""
    return isinstance(rows, IterableDataset)


def first_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all columns of a stream's first rows."""
    return list(dict.fromkeys(name for row in islice(rows, _FIRST) for name in row))


def with_columns(rows: IterableDataset, names: Sequence[str]) -> IterableDataset:
    """Return streamed rows that all have the columns `names`, with null where a row has no value.

    Rows after the first ones may have further columns.
    """
    # The features are only names here: `datasets` doesn't convert the values that a function returns.
    features = Features({name: ExactJson() for name in names})
    return rows.map(_completed, fn_kwargs={"names": names}, features=features)


def _completed(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {**dict.fromkeys(names), **row}


def columns(rows: Rows) -> list[str]:
    """Return the names of the columns, without those that this program has added."""
    return [name for name in rows.column_names if name not in OURS]


def may_have(rows: DatasetDict, names: Iterable[str]) -> bool:
    """Return True if a row of any split may have one of the columns.

    Later rows of a stream may have any column.
    """
    return is_streamed(rows["train"]) or any({*names} & {*columns(rows[split])} for split in SPLITS)


def with_origin(rows: Dataset, source: str, fingerprint: str) -> Dataset:
    """Return `rows` with the column ORIGIN: "`source`, row 1", "`source`, row 2", ..."""
    places = pa.array((f"{source}, row {number}" for number in range(1, len(rows) + 1)), type=pa.string())
    return rows.add_column(ORIGIN, places, new_fingerprint=fingerprint)


def check_names(place: str, names: Iterable[str]) -> None:
    """Raise UserError for columns' names that are reserved or that Arrow can't store."""
    for name in names:
        if name in OURS:
            raise UserError(f"{place}: the column name '{name}' is reserved for this program; rename the column")
        if "\0" in name:
            raise UserError(f"{place}: a column's name contains a NUL character ({name!r}); is the file UTF-16 text?")


def own_rows(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows without the nulls that only their columns' types give them."""
    return (own_values(row, rows.features) for row in rows)


def own_values(row: Mapping[str, Any], features: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a row's values without the nulls that only the columns' types give them."""
    return {name: own_value(value, (features or {}).get(name)) for name, value in row.items()}


def own_value(value: Any, feature: Any) -> Any:
    """Return a column's value without the nulls that only its type gives it.

    Objects of a type with keys have the keys of all rows, with null for keys of other rows. JSON has only its own
    nulls, which are kept.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: own_value(each, feature.get(key)) for key, each in value.items() if each is not None}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return [own_value(each, inner) for each in value] if inner is not None and isinstance(value, list) else value


def declared_names(rows: Dataset, column: str) -> tuple[str, ...]:
    """Return the class names that a column of labels, or of lists of labels, declares."""
    feature = rows.features[column]
    if isinstance(feature, List):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()
