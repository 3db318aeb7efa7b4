"""Direct preference optimisation: prompt, chosen and rejected answer, as TRL's DPOTrainer takes them."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.rows import SPLITS
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import find_columns, map_rows, row_error, text_in

COLUMNS = ("prompt", "chosen", "rejected")  # TRL's names; `data.<name>_column` names other columns for them


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
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
    samples = rows["eval"].select(range(min(task.samples, len(rows["eval"]))))
    prompts = tuple(samples[names["prompt"]])
    return Examples(
        train=train,
        eval=held_out,
        prompts=prompts,
        rendered=tuple(render(prompt, tokenizer, chat=chat) for prompt in prompts),
        references=tuple(samples[names["chosen"]]),
    )


def uses_template(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Return `chat`, or if it is None, whether the tokenizer has a chat template. Raises ConfigErrors."""
    if chat and not tokenizer.chat_template:
        raise ConfigErrors([Problem("task.chat", "the tokenizer has no chat template", "set task.chat=false")])
    return bool(tokenizer.chat_template) if chat is None else chat


def as_turn(text: str, name: str) -> list[dict[str, str]]:
    """Return a conversation of one turn: the user's for the column `prompt`, else the assistant's."""
    return [{"role": "user" if name == "prompt" else "assistant", "content": text}]


def render(prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """Return the text that the model sees before it answers the prompt."""
    if not chat:
        return prompt
    return str(tokenizer.apply_chat_template(as_turn(prompt, "prompt"), add_generation_prompt=True, tokenize=False))
