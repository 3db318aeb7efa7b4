"""What a task asks of its rows: columns that are there, values of the right kind; and where a wrong one stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loraplus_hydra.data.rows import ORIGIN, SPLITS, columns
from loraplus_hydra.errors import ConfigErrors, Problem, nearest

if TYPE_CHECKING:
    from datasets import DatasetDict


def require_columns(rows: DatasetDict, wanted: Mapping[str, str]) -> None:
    """Raise ConfigErrors when a split lacks a column of `wanted` (config key -> column), saying which are there."""
    problems = []
    for split in SPLITS:
        there = columns(rows[split])
        for key, column in wanted.items():
            if column not in there:
                what = f"the {split} rows have no column '{column}'{nearest(column, there)}"
                problems.append(Problem(key, what, f"the columns are: {', '.join(there)}"))
    if problems:
        raise ConfigErrors(list({problem.key: problem for problem in reversed(problems)}.values()))


def batch_rows(batch: Mapping[str, list[Any]], indices: list[int], split: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a batch, each with the words that say where it stands."""
    names = [name for name in batch if name != ORIGIN]
    for position, index in enumerate(indices):
        place = batch[ORIGIN][position] if ORIGIN in batch else f"row {index + 1} of the {split} rows"
        yield {name: batch[name][position] for name in names}, place


def text_in(row: Mapping[str, Any], column: str, place: str, *, empty: bool = True) -> str:
    """The text in a row's column; raises ConfigErrors when it is something else, or empty where that may not be."""
    value = row[column]
    if not isinstance(value, str):
        raise wrong_value(place, column, f"is {described(value)}, not text")
    if not empty and not value.strip():
        raise wrong_value(place, column, "is empty, so there is nothing to learn")
    return value


def wrong_value(place: str, column: str, what: str, fix: str = "mend the row, or leave it out") -> ConfigErrors:
    """The error for a row's value, to be raised."""
    return ConfigErrors([Problem("data", f"{place}: '{column}' {what}", fix)])


def described(value: Any) -> str:
    """A value in words."""
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
