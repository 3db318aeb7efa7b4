"""Direct preference optimisation: prompt, chosen and rejected answer, as TRL's DPOTrainer takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.rows import SPLITS
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.base import Base, max_length
from loraplus_hydra.tasks.chat import apply_template
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import find_columns, map_rows, row_error, text_in, unused_columns_note

COLUMNS = ("prompt", "chosen", "rejected")  # TRL's names; `data.<name>_column` names other columns for them


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
    base: Base | None = None,
) -> Examples:
    """Return TRL's preference examples of rows with three texts.

    With `chat` (None: if the tokenizer has a chat template) each text becomes a turn. Raises ConfigErrors.
    """
    chat = uses_template(tokenizer, chat)
    names = find_columns(rows, data, COLUMNS)

    def read(row: dict[str, Any], place: str) -> dict[str, Any]:
        texts = {name: text_in(row, column, place, empty=False) for name, column in names.items()}
        if texts["chosen"] == texts["rejected"]:
            raise row_error(place, names["rejected"], "is the chosen answer, so there is nothing to prefer")
        return {name: as_turn(text, name) if chat else text for name, text in texts.items()}

    train, held_out = (map_rows(rows[split], split, read) for split in SPLITS)
    shown = rows["eval"].select(range(min(task.samples, len(rows["eval"]))))
    return Examples(
        train=train,
        eval=held_out,
        max_length=max_length(task, tokenizer, base),
        special_tokens=not chat,
        notes=tuple(unused_columns_note(rows, names.values())),
        **samples(shown[names["prompt"]], shown[names["chosen"]], tokenizer, chat=chat),
    )


def uses_template(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Return `chat`, or if it is None, whether the tokenizer has a chat template.

    Raises ConfigErrors for `chat` without a template.
    """
    if chat and not tokenizer.chat_template:
        raise ConfigErrors([Problem("task.chat", "the tokenizer has no chat template", "set task.chat=false")])
    return bool(tokenizer.chat_template) if chat is None else chat


def as_turn(text: str, name: str) -> list[dict[str, str]]:
    """Return a conversation of one turn: the user's for the column `prompt`, else the assistant's."""
    return [{"role": "user" if name == "prompt" else "assistant", "content": text}]


def samples(
    prompts: Iterable[str], answers: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> dict[str, Any]:
    """Return the fields of Examples that show held-out rows."""

    def render(prompt: str) -> str:
        turns = as_turn(prompt, "prompt")
        return str(apply_template(tokenizer, turns, add_generation_prompt=True, tokenize=False))

    prompts = tuple(prompts)
    rendered = tuple(map(render, prompts)) if chat else prompts
    return {"prompts": prompts, "rendered": rendered, "references": tuple(answers)}
