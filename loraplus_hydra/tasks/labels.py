"""Labels of a classification: kind, names, and the conversion of each row's label."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict

from loraplus_hydra.data.rows import ORIGIN, SPLITS, declared_names
from loraplus_hydra.errors import ConfigErrors, Problem, nearest
from loraplus_hydra.tasks.base import Base
from loraplus_hydra.tasks.metrics import MULTI, REGRESSION, SINGLE
from loraplus_hydra.tasks.rows import describe, row_error

_FEW = 20  # maximum number of labels in a message


@dataclass(frozen=True)
class Labels:
    """The labels' kind, names and column."""

    problem_type: str  # transformers' name for the kind
    names: tuple[str, ...]  # names in the order of the labels' numbers; empty for a regression
    column: str
    of_head: str = ""  # the trained head with these names, as in messages; empty for a new head

    def read(self, value: Any, place: str, declared: Sequence[str] = ()) -> int | float | list[float]:
        """Return a row's label in the form that the model expects. Raises ConfigErrors.

        `declared` has the names that the row's split declares. Then a value is the number of one of them.

        For one label this is the label's number, and for a regression it is the measured number. For several labels it
        is a list with 1.0 for each label of the row and 0.0 for all others.
        """
        if self.problem_type == REGRESSION:
            return _number(value, self.column, place)
        if self.problem_type == SINGLE:
            return self._number_of(value, place, declared)
        given = [self._number_of(label, place, declared) for label in _listed_labels(value, self.column, place)]
        if len(set(given)) < len(given):
            raise row_error(place, self.column, "names a label twice", "list each label of the row once")
        return [float(number in given) for number in range(len(self.names))]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _folded_numbers(self) -> dict[str, int]:
        """The numbers of a trained head's names in lower case. Names that are then equal are omitted."""
        folded = [name.casefold() for name in self.names]
        return {name: folded.index(name) for name in folded if self.of_head and folded.count(name) == 1}

    def number_of(self, name: str) -> int | None:
        """Return the number of the label with this name, or None."""
        return self._numbers.get(name, self._folded_numbers.get(name.casefold()))

    def _number_of(self, value: Any, place: str, declared: Sequence[str]) -> int:
        name = _label_name(value, self.column, place, declared)
        if (number := self.number_of(name)) is not None:
            return number
        owner = f"{self.of_head} doesn't have" if self.of_head else "no training row has"
        what = f"is '{name}', a label that {owner}{nearest(name, self.names)}"
        raise row_error(place, self.column, what, f"the labels are {_listed(self.names)}")

    def model_arguments(self) -> dict[str, Any]:
        """Return the attributes of the model's config that the labels decide."""
        if self.problem_type == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        return {
            "num_labels": len(self.names),
            "problem_type": self.problem_type,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }


def find_labels(
    rows: DatasetDict, column: str, problem_type: str | None, *, sampled: bool, base: Base | None = None
) -> Labels:
    """Find the labels in a column. Without `problem_type`, the training rows decide the labels' kind.

    If `base` has a trained head, its names are used in its order. With `sampled`, evaluation rows may have labels that
    no training row has, because only some rows are used. Raises ConfigErrors for values that can't be labels, for names
    that the trained head doesn't have, and for fewer than two labels.
    """
    kind = problem_type or _kind(rows["train"], column)
    if kind == REGRESSION:
        return Labels(REGRESSION, (), column)
    if kind == MULTI:
        _refuse_one_hot([_from_text(value) for value in rows["train"][column][:]], column)
    _refuse_numbers_for_names(rows, column, kind)
    if base is not None and base.labels:
        labels = Labels(kind, base.labels, column, of_head=base.head)
        _check_fit(labels, base, {name for split in SPLITS for name in _names(rows[split], column, kind, split)})
        return labels
    splits = SPLITS if sampled else SPLITS[:1]
    names = declared_names(rows["train"], column) or _sorted(
        {name for split in splits for name in _names(rows[split], column, kind, split)}
    )
    if len(names) < (2 if kind == SINGLE else 1):
        only = f"'{names[0]}'" if names else "none at all"
        what = f"'{column}' has only one label, {only}, but a classification needs two"
        raise ConfigErrors([Problem("data.label_column", what, "use rows with two or more labels")])
    return Labels(kind, _all_outputs(names, base), column)


def _all_outputs(names: tuple[str, ...], base: Base | None) -> tuple[str, ...]:
    """Return a name for every output of a trained head without names, if `names` are their numbers."""
    outputs = base.unnamed_outputs if base is not None else 0
    for prefix in ("", "LABEL_"):  # transformers' own placeholders
        every = tuple(f"{prefix}{number}" for number in range(outputs))
        if set(names) <= set(every):
            return every
    return names


def similar_note(names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on labels that differ only in case or in surrounding spaces, if there are any."""
    folded = [name.strip().casefold() for name in names]
    similar = [repr(name) for name, fold in zip(names, folded, strict=True) if folded.count(fold) > 1]
    return (f"Labels that differ only in case or spaces: {_listed(similar)}",) if similar else ()


def _check_fit(labels: Labels, base: Base, names: set[str]) -> None:
    """Raise ConfigErrors if a trained head doesn't have all labels of the rows."""
    if unknown := _sorted({name for name in names if labels.number_of(name) is None}):
        what = f"the rows have labels that {labels.of_head} doesn't have: {_listed(unknown)}"
        fix = f"the head's labels are {_listed(labels.names)}; rename the rows' labels"
        if base.replaceable:
            fix += ", or train a new head: task.new_head=true"
        raise ConfigErrors([Problem("data.label_column", what, fix)])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")


def _sorted(names: set[str]) -> tuple[str, ...]:
    """Return names in alphabetical order. If all are whole numbers, the order is numerical."""
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def _label_name(value: Any, column: str, place: str, declared: Sequence[str] = ()) -> str:
    """Return the name of a label that is text, a whole number, or true or false. Raises ConfigErrors.

    With `declared`, the value is the number of one of these names.
    """
    if declared:
        if isinstance(value, int) and 0 <= value < len(declared):
            return declared[value]
        raise row_error(place, column, f"is {describe(value)}, so the row has no label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    what = "is empty" if value == "" else f"is {describe(value)}, not a label"
    fix = "a label must be text or a whole number"
    if isinstance(value, float):
        fix += "; for measured numbers set task.problem_type=regression"
    if isinstance(value, list):
        fix += "; for several labels per row set task.problem_type=multi_label_classification"
    raise row_error(place, column, what, fix)


def _kind(rows: Dataset, column: str) -> str:
    # A list means several labels, a number with a fraction means a regression, and anything else is one label.
    if isinstance(rows.features[column], ClassLabel):
        return SINGLE
    values = [_from_text(value) for value in rows[column][:] if value is not None]
    if any(isinstance(value, list) for value in values):
        return MULTI
    numbers = all(isinstance(value, (int, float)) for value in values)
    if any(isinstance(value, float) and not value.is_integer() for value in values) and numbers:
        return REGRESSION
    return SINGLE


def _from_text(value: Any) -> Any:
    """Return the list or number in a text. Other values are returned unchanged.

    A CSV has only text.
    """
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, (list, int, float)) else value


def _listed_labels(value: Any, column: str, place: str) -> list[Any]:
    labels = _from_text(value)
    if not isinstance(labels, list):
        raise row_error(place, column, f"is {describe(value)}, not a list of labels")
    return labels


def _refuse_one_hot(values: list[Any], column: str) -> None:
    """Raise ConfigErrors for lists with a 0 or 1 for each label.

    They would be read as lists of the labels 0 and 1.
    """
    lists = [value for value in values if isinstance(value, list)]
    size = len(lists[0]) if lists else 0
    if size > 1 and all(len(each) == size and all(label in (0, 1) for label in each) for each in lists):
        what = f"'{column}' has lists of {size} zeros and ones, one for each label"
        raise ConfigErrors([Problem("data.label_column", what, "replace them with lists of the rows' labels: [a, b]")])


def _refuse_numbers_for_names(rows: DatasetDict, column: str, kind: str) -> None:
    """Raise ConfigErrors if one split declares names and the other has numbers, not these names."""
    # The order of the declared names may be another than that of the numbers, so a number can't be read as a name.
    for split, other in (SPLITS, SPLITS[::-1]):
        declared = declared_names(rows[other], column)
        if not declared or declared_names(rows[split], column):
            continue
        found = {name for name in _names(rows[split], column, kind, split) if name.removeprefix("-").isdecimal()}
        if found and found.isdisjoint(declared):
            numbers, names = _listed(_sorted(found)), _listed(declared)
            what = f"the {split} rows have the numbers {numbers}, but the {other} rows have the names {names}"
            fix = f"replace the numbers in '{column}' with their names"
            raise ConfigErrors([Problem("data.label_column", what, fix)])


def _names(rows: Dataset, column: str, kind: str, split: str) -> Iterator[str]:
    declared = declared_names(rows, column)
    places = rows[ORIGIN][:] if ORIGIN in rows.column_names else _row_numbers(len(rows), split)
    for value, place in zip(rows[column][:], places, strict=True):
        if kind == SINGLE:
            yield _label_name(value, column, place, declared)
        else:
            yield from (_label_name(label, column, place, declared) for label in _listed_labels(value, column, place))


def _row_numbers(count: int, split: str) -> Iterator[str]:
    return (f"row {number} of the {split} rows" for number in range(1, count + 1))


def _number(value: Any, column: str, place: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)  # also from text, because a CSV has only text
    except ValueError:
        raise row_error(place, column, f"is {describe(value)}, but a regression needs a number") from None
    if not math.isfinite(number):
        raise row_error(place, column, f"is {number}, not a finite number")
    return number
