"""Answers that end with one end-of-text token in TRL's preference trainers.

DPOTrainer and KTOTrainer (TRL 1.16) write this token after an answer of plain text. A tokenizer that also appends the
token would put it there twice.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from trl.data_utils import is_conversational

from loraplus_hydra.tasks.tokens import tokens_put_last
from loraplus_hydra.training.reference import adds_reference

_ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")  # columns with the tokens of answers


class _OneEndMixin:
    """A mixin that removes the special tokens that the tokenizer appends to answers of plain text."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, *args, **kwargs)  # type: ignore[misc]
        last = tokens_put_last(processing_class)
        if not last or is_conversational(next(iter(dataset))):  # a chat template writes its own special tokens
            return prepared
        return prepared.map(_without_last, fn_kwargs={"last": last})


def with_one_end(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return the class with _OneEndMixin if it is one of TRL's preference trainers; otherwise unchanged."""
    if not adds_reference(trainer_class):
        return trainer_class
    return type(f"OneEnd{trainer_class.__name__}", (_OneEndMixin, trainer_class), {})


def _without_last(row: dict[str, Any], last: int) -> dict[str, Any]:
    return {name: row[name][:-last] for name in _ANSWERS if row.get(name) is not None}
