"""Functions that hold rows out, draw rows at random, and mix data sets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets

from loraplus_hydra.data.cache import digest
from loraplus_hydra.data.exact_json import ExactJson, json_text
from loraplus_hydra.data.rows import CONTINUES, Rows, declared_names, is_streamed, own_value
from loraplus_hydra.errors import UserError, first_of


def hold_out(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return (rows for training, rows held out), each with at least one row.

    `rows` must have at least two rows. The rows held out are drawn with `seed`. If documents consist of several rows,
    the last rows are held out instead.
    """
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    if CONTINUES in rows.column_names:
        return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [index for index in range(len(rows)) if index not in held_out]
    return rows.select(kept), rows.select(sorted(held_out))


def draw(rows: Rows, count: int | None, seed: int) -> Rows:
    """Return `count` rows, drawn with `seed`, in their original order.

    All rows are returned if there are not more than `count`, or if `count` is None. If the rows are streamed, or
    documents consist of several rows, the first rows are returned instead.
    """
    if count is not None and is_streamed(rows):
        return rows.take(count)
    if count is None or count >= len(rows):
        return rows
    if CONTINUES in rows.column_names:
        return rows.select(range(count))
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))


def mix(parts: Sequence[Dataset], weights: Sequence[float] | None, seed: int, limit: int | None = None) -> Dataset:
    """Return the parts as one data set of at most `limit` rows.

    With `weights`, rows are drawn in these shares. No row is repeated, so rows are drawn until one part is used up. A
    column that only some parts have is null in the rows of the other parts. A column of several types keeps each
    row's own value.
    """
    counts = [len(part) for part in parts]
    if weights is not None:
        counts = shares(counts, weights)
    if limit is not None and any(CONTINUES in part.column_names for part in parts):
        # Only first rows are drawn from documents, and all parts together would give the first part's rows.
        counts = portions(counts, limit)
    parts = [draw(part, count, seed) for part, count in zip(parts, counts, strict=True) if count]
    return draw(parts[0] if len(parts) == 1 else concatenate_datasets(_aligned(parts)), limit, seed)


def _aligned(parts: Sequence[Dataset]) -> list[Dataset]:
    """Return the parts. Columns whose types differ between parts are converted to JSON text.

    Raises UserError for numbers in place of class names.
    """
    types: dict[str, set[str]] = {}
    for part in parts:
        for name, feature in part.features.items():
            types.setdefault(name, set()).add(repr(feature))
    mixed = [name for name, found in types.items() if len(found - {repr(Value("null"))}) > 1]
    for name in mixed:
        _refuse_numbers_for_names([part for part in parts if name in part.features], name)
    return [_with_json(part, [name for name in mixed if name in part.features]) for part in parts]


def _refuse_numbers_for_names(parts: Sequence[Dataset], column: str) -> None:
    """Raise UserError if a column has class names in one part, and other numbers in another part."""
    # The numbers may be those of the names or not. As further labels they would double the number of labels.
    names = dict.fromkeys(name for part in parts for name in declared_names(part, column))
    values = [value for part in parts if names and not declared_names(part, column) for value in part[column][:]]
    single = [each for value in values for each in (value if isinstance(value, list) else [value])]
    numbers = dict.fromkeys(str(each) for each in single if type(each) is int or str(each).isdecimal())
    if other := [number for number in numbers if number not in names]:
        what = f"the column '{column}' has the names {first_of(list(names), 5)} in one file"
        raise UserError(f"{what}, and the numbers {first_of(other, 5)} in another: replace the numbers with names")


def _with_json(rows: Dataset, names: list[str]) -> Dataset:
    if not names:
        return rows
    types = {name: rows.features[name] for name in names}
    features = Features({**rows.features, **{name: ExactJson() for name in names}})
    return rows.map(
        lambda batch: {name: [_json_text(value, types[name]) for value in batch[name]] for name in names},
        batched=True,
        features=features,
        new_fingerprint=digest(rows._fingerprint, "json", names),
    )


def _json_text(value: Any, feature: Any) -> str | None:
    """Return a value as JSON text, with labels as names, and without keys of other rows."""
    if isinstance(feature, List) and isinstance(feature.feature, ClassLabel) and value is not None:
        value, feature = [_class_name(each, feature.feature) for each in value], List(Value("string"))
    elif isinstance(feature, ClassLabel):
        value = _class_name(value, feature)
    value = own_value(value, feature)
    # Not the value itself, because `datasets` would read a text such as "1" as JSON.
    return None if value is None else json_text(value)


def _class_name(number: int | None, label: ClassLabel) -> str | None:
    return None if number is None or number < 0 else label.names[number]


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return the number of rows to draw from each part.

    The numbers are in the ratio of the weights, at least 1, and at most the part's size.
    """
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, max(1, round(total * weight))) for size, weight in zip(sizes, weights, strict=True)]


def portions(sizes: Sequence[int], count: int) -> list[int]:
    """Return the number of rows of each part, in the ratio of the sizes; the sum is at most `count`."""
    share = min(1, count / sum(sizes))
    ends = [round(end * share) for end in accumulate(sizes)]
    return [end - begin for begin, end in pairwise([0, *ends])]
