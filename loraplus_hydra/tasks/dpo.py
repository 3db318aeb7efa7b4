"""Direct preference optimisation: prompt, chosen and rejected answer, as TRL's DPOTrainer takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.tasks.answers import AnswerReader, Answers, answer_notes, uses_template, without_reports
from loraplus_hydra.tasks.base import Base, max_length
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.preference import find_preference_shape
from loraplus_hydra.tasks.rows import unused_columns_note


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
    base: Base | None = None,
) -> Examples:
    """Return TRL's preference examples of rows with a prompt and two answers.

    With `chat` (None: if the tokenizer has a chat template) texts become turns. Raises ConfigErrors.
    """
    written_as_turns = uses_template(tokenizer, chat)
    shape = find_preference_shape(rows, data)

    def read(row: Mapping[str, Any], place: str) -> tuple[Answers, dict[str, Any]]:
        return vars(shape.read(row, place, chat=written_as_turns)), {}

    reader = AnswerReader(
        read, ("chosen", "rejected"), chat=written_as_turns, key={"task": "dpo", "shape": asdict(shape)}
    )
    encoded, limit = reader.columns(rows, tokenizer, task), max_length(task, tokenizer, base)
    return Examples(
        train=without_reports(encoded["train"]),
        eval=without_reports(encoded["eval"]),
        max_length=limit,
        special_tokens=not written_as_turns,
        notes=(
            *unused_columns_note(rows, shape.used(chat=written_as_turns)),
            *answer_notes(encoded, rows, limit, task, base),
        ),
        **reader.samples(rows["eval"].select(range(min(task.samples, len(rows["eval"])))), tokenizer),
    )
