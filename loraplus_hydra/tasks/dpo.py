"""Direct preference optimisation: prompt, chosen and rejected answer -> what TRL's DPOTrainer takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplus_hydra.data.rows import SPLITS, all_columns
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import batch_rows, require_columns, text_in, wrong_value

if TYPE_CHECKING:
    from datasets import DatasetDict
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from loraplus_hydra.data.rows import Rows

COLUMNS = ("prompt", "chosen", "rejected")  # TRL's names; `data.<name>_column` maps others to them


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
) -> Examples:
    """Rows of texts as TRL's preference examples; with a chat template each becomes a turn. Raises ConfigErrors."""
    chat = in_turns(tokenizer, chat)
    names = {name: data.get(f"{name}_column") or name for name in COLUMNS}
    require_columns(rows, {f"data.{name}_column": column for name, column in names.items()})
    held_out = rows["eval"].select(range(min(task.samples, len(rows["eval"]))))
    prompts = tuple(held_out[names["prompt"]])
    return Examples(
        train=_pairs(rows["train"], names, "train", chat=chat),
        eval=_pairs(rows["eval"], names, "eval", chat=chat),
        prompts=prompts,
        rendered=tuple(rendered(prompt, tokenizer, chat=chat) for prompt in prompts),
        references=tuple(held_out[names["chosen"]]),
    )


def _pairs(rows: Rows, names: dict[str, str], split: str, *, chat: bool) -> Rows:
    assert split in SPLITS

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for row, place in batch_rows(batch, indices, split):
            texts = {name: text_in(row, column, place, empty=False) for name, column in names.items()}
            if texts["chosen"] == texts["rejected"]:
                raise wrong_value(place, names["rejected"], "is the chosen answer, so there is nothing to prefer")
            for name, text in texts.items():
                found[name].append(turn(text, name) if chat else text)
        return found

    return rows.map(convert, batched=True, with_indices=True, remove_columns=all_columns(rows))


def in_turns(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Return `task.chat`, or for None whether the tokenizer has a chat template. Raises ConfigErrors."""
    if chat and not tokenizer.chat_template:
        raise ConfigErrors([Problem("task.chat", "the tokenizer has no chat template", "set task.chat=false")])
    return bool(tokenizer.chat_template) if chat is None else chat


def turn(text: str, name: str) -> list[dict[str, str]]:
    """A conversation of one turn: the user's for the column `prompt`, the assistant's for every other."""
    return [{"role": "user" if name == "prompt" else "assistant", "content": text}]


def rendered(prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """The prompt as the model sees it when it is to answer."""
    if not chat:
        return prompt
    return str(tokenizer.apply_chat_template(turn(prompt, "prompt"), add_generation_prompt=True, tokenize=False))
