"""Direct preference optimisation: prompt, chosen and rejected answer for TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from loraplus_hydra.config.targets import locate
from loraplus_hydra.data.rows import SPLITS, Rows, columns, is_streamed
from loraplus_hydra.tasks.answers import AnswerReader, Answers, answer_notes, uses_template, without_reports
from loraplus_hydra.tasks.base import Base, max_length
from loraplus_hydra.tasks.conversation import FUNCTIONS, TOOLS
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.preference import find_preference_shape
from loraplus_hydra.tasks.row_notes import rows_note
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

    With `chat`, texts become turns (None: if the tokenizer has a chat template). Raises ConfigErrors.
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
            *_repeated_prompt_note(encoded["train"], rows["train"]),
            *(_tools_note(rows, task) if written_as_turns else ()),
        ),
        **reader.samples(rows["eval"].select(range(min(task.samples, len(rows["eval"])))), tokenizer),
    )


def _repeated_prompt_note(encoded: Rows, rows: Rows) -> list[str]:
    """Return a note on training rows if both answers begin with the prompt."""
    if is_streamed(encoded):
        return []
    lines = encoded.select_columns(["prompt", "chosen", "rejected"])
    numbers = [number for number, row in enumerate(lines) if _repeats_prompt(row)]
    text = "both answers begin with the prompt, so the prompt is also learnt: remove it from the answers."
    return [note] if (note := rows_note(numbers, rows, "train", text)) else []


def _repeats_prompt(row: Mapping[str, Any]) -> bool:
    prompt, *answers = (row[name] if isinstance(row[name], str) else row[name][-1].get("content") for name in row)
    return bool(prompt and prompt.strip()) and all(answer and answer.startswith(prompt) for answer in answers)


def _tools_note(rows: DatasetDict, task: DictConfig) -> list[str]:
    names = {name for split in SPLITS for name in columns(rows[split])}
    if not {TOOLS, FUNCTIONS} & names or issubclass(locate(task._target_), DPOTrainer):
        return []
    return [f"{task._target_} may not pass tools to the chat template, unlike TRL's DPOTrainer: see `preview`."]
