"""Kahneman-Tversky optimisation: answers with a label, good or bad, for TRL's KTOTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from datasets import DatasetDict, Features, Value
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.rows import is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.answers import AnswerReader, Answers, answer_notes, uses_template, without_reports
from loraplus_hydra.tasks.base import Base, max_length
from loraplus_hydra.tasks.conversation import Conversation, find_shape
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.preference import has_preferences, judged, needs_template
from loraplus_hydra.tasks.rows import describe, require_columns, row_error, unused_columns_note
from loraplus_hydra.tasks.template import check_template

LABELS = {
    "true": True,
    "1": True,
    "1.0": True,
    "false": False,
    "0": False,
    "0.0": False,
}  # labels as text, because a CSV has only text


def config_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Return a Problem for batches of one row."""
    task, batch_size = config["task"], config.get("trainer", {}).get("per_device_train_batch_size")
    # apo_zero_unpaired is the only loss that doesn't compare the answers of a batch.
    alone = task["args"].get("loss_type") == "apo_zero_unpaired"
    if task["_target_"] != "trl.KTOTrainer" or batch_size != 1 or alone:
        return []
    what = "KTO combines each prompt of a batch with the answer to another prompt, but a batch of one row has no other"
    return [Problem("trainer.per_device_train_batch_size", what, "set 2 or more")]


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
    base: Base | None = None,
) -> Examples:
    """Return TRL's unpaired preferences of rows with a prompt, an answer and its label.

    Prompt and answer can be a conversation. With `chat`, texts become turns (None: if the tokenizer has a chat
    template). Training rows are shuffled with `data.seed`. Raises ConfigErrors.
    """
    _refuse_other_rows(rows, data)
    written_as_turns = uses_template(tokenizer, chat)
    shape, label = find_shape(rows, data), data.get("label_column") or "label"
    require_columns(rows, {"data.label_column": label})
    check_template(tokenizer, shape, chat=chat)

    def read(row: Mapping[str, Any], place: str) -> tuple[Answers, dict[str, Any]]:
        if isinstance(prompt := shape.question(row, place), str) and not prompt.strip():
            raise row_error(place, str(shape.prompt), "is empty, so there is nothing to answer")
        column = str(shape.messages or shape.completion or shape.text)
        part = judged(shape.read(row, place, chat=written_as_turns), column, place)
        if isinstance(part, Conversation) and not written_as_turns:
            raise ConfigErrors([needs_template(place)])
        return {"completion": part}, {"label": _label(row[label], label, place)}

    reader = AnswerReader(
        read,
        ("completion",),
        others=Features({"label": Value("bool")}),
        chat=written_as_turns,
        key={"task": "kto", "shape": asdict(shape), "label": label},
    )
    encoded, limit = reader.columns(rows, tokenizer, task), max_length(task, tokenizer, base)
    good = _count_good(encoded["train"]["label"][:])
    # Only good answers are shown as references.
    shown = rows["eval"].select(
        [index for index, label in enumerate(encoded["eval"]["label"][:]) if label][: task.samples]
    )
    return Examples(
        # TRL pairs the rows of a batch before training, and uses the same pairs in each epoch.
        train=without_reports(encoded["train"]).shuffle(seed=data.get("seed") or 0),
        eval=without_reports(encoded["eval"]),
        max_length=limit,
        special_tokens=not written_as_turns,
        notes=(
            f"{good:,} good and {len(encoded['train']) - good:,} bad answers for training",
            *unused_columns_note(rows, {label, *shape.used(chat=written_as_turns)}),
            *answer_notes(encoded, rows, limit, task, base),
        ),
        **reader.samples(shown, tokenizer),
    )


def _refuse_other_rows(rows: DatasetDict, data: DictConfig) -> None:
    """Raise ConfigErrors for streamed rows and for pairs of answers."""
    if is_streamed(rows["train"]):
        what = "KTO needs all rows at once to mix good and bad answers"
        raise ConfigErrors([Problem("data.streaming", what, "set data.streaming=false")])
    if has_preferences(rows, data):
        what = "the rows have pairs of answers, but KTO learns from single answers with a label"
        raise ConfigErrors([Problem("data", what, "task=dpo learns from pairs")])


def _count_good(labels: Sequence[bool]) -> int:
    good = sum(labels)
    if good in (0, len(labels)):
        label = str(good > 0).lower()
        what = f"all {len(labels)} training rows have the label {label}, but KTO needs good and bad answers"
        raise ConfigErrors([Problem("data.label_column", what, "add rows with the other label")])
    return good


def _label(value: Any, column: str, place: str) -> bool:
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise row_error(place, column, f"is {describe(value)}, not true or false", "true = a good answer")
    return label
