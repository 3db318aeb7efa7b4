"""Labels for a trained head whose outputs are called LABEL_0, LABEL_1, ... or have no names at all."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from loraplus_hydra.tasks.base import Base
from loraplus_hydra.tasks.classification import _head_note
from loraplus_hydra.tasks.labels import Labels, find_labels

HEAD = Base(replaceable=True, unnamed_outputs=3)


def found(values: list[Any], base: Base = HEAD, kind: str | None = None) -> Labels:
    rows = Dataset.from_dict({"text": [f"say {i}" for i in range(len(values))], "label": values})
    return find_labels(DatasetDict(train=rows, eval=rows), "label", kind, sampled=False, base=base)


@pytest.mark.parametrize("values", [[0, 2], ["2", "0"], ["LABEL_0", "LABEL_2"]])
def test_numbers_of_outputs_keep_the_head(values: list[Any]) -> None:
    labels = found(values)
    assert labels.model_arguments()["num_labels"] == 3
    assert [labels.read(value, "row 1") for value in values] == [int(str(value)[-1]) for value in values]
    assert "new head" not in "".join(_head_note(labels, HEAD))


@pytest.mark.parametrize(
    ("values", "kind", "needed"), [(["x", "y"], None, 2), ([0, 3], None, 2), ([0.5, 1.5], "regression", 1)]
)
def test_labels_that_do_not_fit_replace_the_head_with_a_note(values: list[Any], kind: str | None, needed: int) -> None:
    labels = found(values, kind=kind)
    assert labels.model_arguments()["num_labels"] == needed
    expected = f"The model's trained head has 3 outputs, and {needed} are needed: a new head replaces it."
    assert _head_note(labels, HEAD) == (expected,)


def test_names_of_as_many_labels_name_the_outputs_with_a_note() -> None:
    labels = found(["x", "y", "z"])
    assert "name them in this order: x, y, z" in _head_note(labels, HEAD)[0]
