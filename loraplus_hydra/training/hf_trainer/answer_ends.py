"""Plain texts with one beginning and one end in TRL's preference trainers.

DPOTrainer and KTOTrainer (TRL 1.16) write the end-of-text token after an answer. A tokenizer that also appends the
token would put it there twice. A prompt that has the token that the tokenizer puts first would begin twice.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from trl.data_utils import is_conversational

from loraplus_hydra.tasks.tokens import begun_once, tokens_put_first, tokens_put_last
from loraplus_hydra.training.reference import adds_reference

_ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")  # columns with the tokens of answers


class _OneEndMixin:
    """A mixin that removes a prompt's second beginning, and the special tokens appended to answers."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, *args, **kwargs)  # type: ignore[misc]
        first, last = tokens_put_first(processing_class), tokens_put_last(processing_class)
        # A chat template writes its own special tokens.
        if not (first or last) or is_conversational(next(iter(dataset))):
            return prepared
        return prepared.map(_once, fn_kwargs={"first": first, "last": last})


def with_one_end(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return the class with _OneEndMixin if it is one of TRL's preference trainers; otherwise unchanged."""
    if not adds_reference(trainer_class):
        return trainer_class
    return type(f"OneEnd{trainer_class.__name__}", (_OneEndMixin, trainer_class), {})


def _once(row: dict[str, Any], first: list[int], last: int) -> dict[str, Any]:
    answers = {name: row[name][: len(row[name]) - last] for name in _ANSWERS if row.get(name) is not None}
    return answers | {name: begun_once(row[name], first) for name in ("prompt_ids",) if name in row}
