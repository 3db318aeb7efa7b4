"""Labels of classification: what kind they are, their names, and each row's as the model takes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loraplus_hydra.data.rows import ORIGIN, SPLITS
from loraplus_hydra.errors import ConfigErrors, Problem, nearest
from loraplus_hydra.tasks.metrics import MULTI, REGRESSION, SINGLE
from loraplus_hydra.tasks.rows import described, wrong_value

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_FEW = 20  # labels shown in a message


@dataclass(frozen=True)
class Labels:
    """The kind of the labels (transformers' `problem_type`), their names in order, and the column that holds them."""

    problem_type: str
    names: tuple[str, ...]  # of a regression none
    column: str
    numbered: bool = False  # the column holds numbers of the names, as the data set declares

    def read(self, value: Any, place: str) -> int | float | list[float]:
        """A row's label: its number, a measured number, or 1.0 for each label that is given and 0.0 for the others."""
        if self.problem_type == REGRESSION:
            return _number(value, self.column, place)
        if self.problem_type == SINGLE:
            return self._number_of(value, place)
        if not isinstance(value, list):
            raise wrong_value(place, self.column, f"is {described(value)}, not a list of labels")
        given = {self._number_of(label, place) for label in value}
        return [float(number in given) for number in range(len(self.names))]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def _number_of(self, value: Any, place: str) -> int:
        if self.numbered:
            if isinstance(value, int) and 0 <= value < len(self.names):
                return value
            raise wrong_value(place, self.column, f"is {described(value)}: the row has no label")
        name = label_name(value, self.column, place)
        if name in self._numbers:
            return self._numbers[name]
        shown = ", ".join(self.names[:_FEW]) + (", ..." if len(self.names) > _FEW else "")
        what = f"is '{name}', a label that no training row has{nearest(name, self.names)}"
        raise wrong_value(place, self.column, what, f"the labels are: {shown}")

    def model_arguments(self) -> dict[str, Any]:
        """What the model's config must say of them."""
        if self.problem_type == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        return {
            "num_labels": len(self.names),
            "problem_type": self.problem_type,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }


def find_labels(rows: DatasetDict, column: str, problem_type: str | None, *, sampled: bool) -> Labels:
    """The labels in the column. A kind that isn't given is told by the training rows' values.

    `sampled` says that rows were left out, so that an evaluation row may well have a label that no training row has: it
    counts then. Raises ConfigErrors for values that can't be labels, and for fewer than two labels.
    """
    kind = problem_type or _kind(rows["train"], column)
    if kind == REGRESSION:
        return Labels(REGRESSION, (), column)
    declared = _declared_names(rows["train"], column)
    if declared is None:
        splits = SPLITS if sampled else SPLITS[:1]
        found = {name for split in splits for name in _names(rows[split], column, kind, split)}
        figures = all(name.lstrip("-").isdigit() for name in found)
        names = tuple(sorted(found, key=lambda name: (int(name) if figures else 0, name)))
    else:
        names = declared
    if len(names) < (2 if kind == SINGLE else 1):
        only = f"'{names[0]}' alone" if names else "none at all"
        what = f"'{column}' has one label, {only}, so there is nothing to tell apart"
        raise ConfigErrors([Problem("data.label_column", what, "give rows of two labels or more")])
    return Labels(kind, names, column, numbered=declared is not None)


def label_name(value: Any, column: str, place: str) -> str:
    """A label as its name: text as it is, whole numbers and truth values in figures and words."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    what = "is empty" if value == "" else f"is {described(value)}, no label"
    fix = "a label is a text or a whole number"
    if isinstance(value, float):
        fix += "; to learn measured numbers set task.problem_type=regression"
    if isinstance(value, list):
        fix += "; for several labels a row set task.problem_type=multi_label_classification"
    raise wrong_value(place, column, what, fix)


def _kind(rows: Dataset, column: str) -> str:
    """A list is several labels, a number with a fraction is measured, anything else is one label."""
    from datasets import ClassLabel

    if isinstance(rows.features[column], ClassLabel):
        return SINGLE
    values = [value for value in rows[column] if value is not None]
    if any(isinstance(value, list) for value in values):
        return MULTI
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return REGRESSION
    return SINGLE


def _declared_names(rows: Dataset, column: str) -> tuple[str, ...] | None:
    """The names that the data set itself declares, if it does."""
    from datasets import ClassLabel, List

    feature = rows.features[column]
    if isinstance(feature, List):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _names(rows: Dataset, column: str, kind: str, split: str) -> Iterator[str]:
    places = rows[ORIGIN] if ORIGIN in rows.column_names else _row_numbers(len(rows), split)
    for value, place in zip(rows[column], places, strict=True):
        if kind == SINGLE:
            yield label_name(value, column, place)
        elif isinstance(value, list):
            yield from (label_name(label, column, place) for label in value)
        else:
            raise wrong_value(place, column, f"is {described(value)}, not a list of labels")


def _row_numbers(count: int, split: str) -> Iterator[str]:
    return (f"row {number} of the {split} rows" for number in range(1, count + 1))


def _number(value: Any, column: str, place: str) -> float:
    """A measured number; a CSV's cells are text."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except ValueError:
        raise wrong_value(place, column, f"is {described(value)}, not a number, which a regression learns") from None
    if not math.isfinite(number):
        raise wrong_value(place, column, f"is {number}, not a finite number")
    return number
