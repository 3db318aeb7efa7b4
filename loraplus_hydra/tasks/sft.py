"""Supervised fine-tuning: prompt and completion columns -> what TRL's SFTTrainer takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplus_hydra.examples import Examples

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase


def examples(rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: DictConfig, data: DictConfig) -> Examples:
    """Rows with the columns `data.prompt_column` and `data.completion_column` as TRL's prompt-completion examples.

    With `task.chat` (or, when it is null, with a tokenizer that has a chat template) each becomes a turn of a user and
    one of the assistant.
    """
    chat = bool(tokenizer.chat_template) if task.chat is None else task.chat
    columns = (data.prompt_column, data.completion_column)
    held_out = rows["eval"].select(range(min(task.samples, len(rows["eval"]))))
    prompts = tuple(held_out[data.prompt_column])
    return Examples(
        train=_prompt_completion(rows["train"], *columns, chat=chat),
        eval=_prompt_completion(rows["eval"], *columns, chat=chat),
        prompts=prompts,
        rendered=tuple(_rendered(prompt, tokenizer, chat=chat) for prompt in prompts),
        references=tuple(held_out[data.completion_column]),
    )


def _prompt_completion(dataset: Dataset, prompt: str, completion: str, *, chat: bool) -> Dataset:
    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if not chat:
            return {"prompt": batch[prompt], "completion": batch[completion]}
        return {
            "prompt": [[{"role": "user", "content": text}] for text in batch[prompt]],
            "completion": [[{"role": "assistant", "content": text}] for text in batch[completion]],
        }

    return dataset.map(convert, batched=True, remove_columns=dataset.column_names)


def _rendered(prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    if not chat:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
