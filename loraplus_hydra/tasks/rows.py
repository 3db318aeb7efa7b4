"""Checks of the rows' columns and values. Errors have the row's place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import DatasetDict

from loraplus_hydra.data.rows import ORIGIN, SPLITS, columns, own_values
from loraplus_hydra.errors import ConfigErrors, Problem, nearest


def require_columns(rows: DatasetDict, wanted: Mapping[str, str]) -> None:
    """Raise ConfigErrors if a split doesn't have a column of `wanted`.

    `wanted` is {config key: column}.
    """
    problems = []
    for split in SPLITS:
        available = columns(rows[split])
        for key, column in wanted.items():
            if column not in available:
                what = f"the {split} rows have no column '{column}'{nearest(column, available)}"
                problems.append(Problem(key, what, f"the columns are {', '.join(available)}"))
    if problems:
        # One Problem for each key. If both splits have no such column, the Problem is about the training rows.
        raise ConfigErrors(list({problem.key: problem for problem in reversed(problems)}.values()))


def batch_rows(
    batch: Mapping[str, list[Any]], indices: list[int], split: str, features: Mapping[str, Any] | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (row, place) for the rows of a batch.

    With the columns' `features`, values are without the nulls that only their types give them. The place is the row's
    file and line if known, otherwise the row's number in the split.
    """
    names = [name for name in batch if name != ORIGIN]
    for position, index in enumerate(indices):
        place = batch[ORIGIN][position] if ORIGIN in batch else f"row {index + 1} of the {split} rows"
        yield own_values({name: batch[name][position] for name in names}, features), place


def text_in(row: Mapping[str, Any], column: str, place: str, *, empty: bool = True) -> str:
    """Return the text in a row's column.

    Raises ConfigErrors if the value is not text. With `empty=False`, only white space is an error, too.
    """
    value = row[column]
    if not isinstance(value, str):
        raise row_error(place, column, f"is {describe(value)}, not text")
    if not empty and not value.strip():
        raise row_error(place, column, "is empty, so there is nothing to learn")
    return value


def row_error(place: str, column: str, what: str, fix: str = "correct or remove the row") -> ConfigErrors:
    """Return the error about a row's value."""
    return ConfigErrors([Problem("data", f"{place}: '{column}' {what}", fix)])


def unused_columns_note(rows: DatasetDict, used: Iterable[str]) -> list[str]:
    """Return a note on the training rows' columns that the task doesn't use."""
    unused = [name or "''" for name in columns(rows["train"]) if name not in set(used)]
    return [f"Unused columns: {', '.join(unused)}"] if unused else []


def describe(value: Any) -> str:
    """Return a description of a value, such as 'the number 3'."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return f"a {type(value).__name__}"
