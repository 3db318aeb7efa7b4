"""Kahneman-Tversky optimisation: answers labelled good or bad, as TRL's KTOTrainer takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.rows import SPLITS, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.base import Base, max_length
from loraplus_hydra.tasks.dpo import as_turn, samples, uses_template
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import describe, find_columns, map_rows, row_error, text_in, unused_columns_note

COLUMNS = ("prompt", "completion", "label")  # TRL's names; `data.<name>_column` names other columns for them
LABELS = {"true": True, "1": True, "false": False, "0": False}  # as text too, because a CSV has nothing else


def config_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Return a Problem for batches of one row."""
    task, batch_size = config["task"], config.get("trainer", {}).get("per_device_train_batch_size")
    # The loss compares the answers of a batch, except this one.
    alone = task["args"].get("loss_type") == "apo_zero_unpaired"
    if task["_target_"] != "trl.KTOTrainer" or batch_size != 1 or alone:
        return []
    what = "KTO takes for each prompt of a batch the answer to another one, and a batch of one row has none"
    return [Problem("trainer.per_device_train_batch_size", what, "2 or more")]


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

    With `chat` (None: if the tokenizer has a chat template) each text becomes a turn. Training rows are shuffled by
    `data.seed`. Raises ConfigErrors.
    """
    if is_streamed(rows["train"]):
        what = "KTO needs all its rows at once, to mix good answers and bad ones"
        raise ConfigErrors([Problem("data.streaming", what, "set data.streaming=false")])
    chat = uses_template(tokenizer, chat)
    names = find_columns(rows, data, COLUMNS)

    def read(row: dict[str, Any], place: str) -> dict[str, Any]:
        texts = {name: text_in(row, names[name], place, empty=False) for name in ("prompt", "completion")}
        turns: dict[str, Any] = {name: as_turn(text, name) if chat else text for name, text in texts.items()}
        return turns | {"label": _label(row[names["label"]], names["label"], place)}

    train, held_out = (map_rows(rows[split], split, read) for split in SPLITS)
    good = _count_good(train["label"])
    # Only good answers are references to show.
    shown = rows["eval"].select([index for index, label in enumerate(held_out["label"]) if label][: task.samples])
    return Examples(
        # TRL pairs the rows of a batch before training and then keeps their order, the same in each epoch.
        train=train.shuffle(seed=data.get("seed") or 0),
        eval=held_out,
        max_length=max_length(task, tokenizer, base),
        special_tokens=not chat,
        **samples(shown[names["prompt"]], shown[names["completion"]], tokenizer, chat=chat),
        notes=(
            f"{good:,} good answers and {len(train) - good:,} bad ones to train on",
            *unused_columns_note(rows, names.values()),
        ),
    )


def _count_good(labels: list[bool]) -> int:
    good = sum(labels)
    if good in (0, len(labels)):
        label = str(good > 0).lower()
        what = f"all {len(labels)} training rows have the label {label}, so there is nothing to tell apart"
        raise ConfigErrors([Problem("data.label_column", what, "KTO learns from good answers and bad ones")])
    return good


def _label(value: Any, column: str, place: str) -> bool:
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise row_error(place, column, f"is {describe(value)}, not true or false", "true = a good answer")
    return label
