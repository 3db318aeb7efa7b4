"""Supervised fine-tuning: prompt and completion, conversations or plain text -> what TRL's SFTTrainer takes.

Rows become tokens and labels here, so that everything wrong with them is known before the model is loaded; TRL cuts,
packs and batches them. https://huggingface.co/docs/trl/sft_trainer
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loraplus_hydra.data.cache import map_cached, tokenizer_digest
from loraplus_hydra.data.rows import SPLITS, all_columns, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.conversation import Conversation, Shape, Text, shape_of
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import batch_rows
from loraplus_hydra.tasks.template import check_template, end_token, loss_rule, take_template
from loraplus_hydra.tasks.tokens import IGNORED, Encoded, LossRule, encode_conversation, encode_texts

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from loraplus_hydra.data.rows import Rows

# With assistant_only_loss SFTTrainer insists on a column of messages, even beside labels; it doesn't read it then.
_ANY_TURNS = [{"role": "assistant", "content": ""}]


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
) -> Examples:
    """Rows in any of TRL's shapes as tokens and labels.

    With `chat` (or, when it is None, with a tokenizer that has a chat template) a prompt and its completion become a
    turn of the user and one of the assistant; plain text stays plain. Raises ConfigErrors.
    """
    shape = shape_of(rows, data)
    end = end_token(tokenizer, task)
    take_template(tokenizer, task)
    check_template(tokenizer, shape, chat=chat)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    rule, notes = loss_rule(tokenizer, shape, task, chat=chat)
    key = {
        "task": "sft",
        "tokenizer": tokenizer_digest(tokenizer),
        "shape": vars(shape),
        "chat": chat,
        "rule": vars(rule),
        "end": end,
    }
    encoded = {}
    for split in SPLITS:
        convert = _converter(shape, tokenizer, rule, end, split, chat=chat)
        encoded[split] = _tokenised(rows[split], convert, rule, key)
    for split in SPLITS:
        encoded[split], more = _noted(encoded[split], split, task)
        notes += more
    prompts, rendered, references = _samples(rows["eval"], tokenizer, shape, task.samples, chat=chat)
    return Examples(
        train=encoded["train"],
        eval=encoded["eval"],
        prompts=prompts,
        rendered=rendered,
        references=references,
        notes=tuple(notes),
    )


def _converter(
    shape: Shape, tokenizer: PreTrainedTokenizerBase, rule: LossRule, end: str, split: str, *, chat: bool
) -> Any:
    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found = [(shape.read(row, place, chat=chat), place) for row, place in batch_rows(batch, indices, split)]
        texts = iter(encode_texts([each for each, _ in found if isinstance(each, Text)], tokenizer, rule, end))
        encoded: list[Encoded] = [
            encode_conversation(each, tokenizer, rule, place) if isinstance(each, Conversation) else next(texts)
            for each, place in found
        ]
        columns = {name: [getattr(row, name) for row in encoded] for name in ("input_ids", "labels", "merged")}
        return columns | ({"messages": [_ANY_TURNS] * len(encoded)} if rule.assistant_only else {})

    return convert


def _tokenised(rows: Rows, convert: Any, rule: LossRule, key: dict[str, Any]) -> Rows:
    """The rows with the columns input_ids, labels and merged, and for `assistant_only` one of messages."""
    from datasets import Features, List, Value

    features = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "merged": Value("bool")}
    if rule.assistant_only:
        features["messages"] = List({"role": Value("string"), "content": Value("string")})
    return map_cached(rows, convert, columns=all_columns(rows), features=Features(features), key=key)


def _noted(rows: Rows, split: str, task: DictConfig) -> tuple[Rows, list[str]]:
    """The rows as the Trainer takes them, and how many are cut, left out or merged; ConfigErrors if none is left."""
    if is_streamed(rows):
        return rows.remove_columns("merged"), []
    limit = task.args.get("max_length")
    notes = []
    merged = sum(rows["merged"])
    rows = rows.remove_columns("merged")
    if merged:
        notes.append(
            f"In {merged:,} of {len(rows):,} {split} rows the prompt's end and the completion's beginning share a "
            "token, which counts as the completion's: end prompts, or begin completions, with a space or a line's end."
        )
    long = [] if limit is None else list(_too_long(rows, limit))
    if long and not (task.args.get("packing") and task.args.get("packing_strategy") in ("bfd_split", "wrapped")):
        emptied = sum(all(label == IGNORED for label in rows[index]["labels"][:limit]) for index in long)
        notes.append(
            f"{len(long):,} of {len(rows):,} {split} rows are longer than {limit} tokens: their ends are cut off."
        )
        if emptied:
            notes.append(f"{emptied:,} of these have no token left to learn and are left out.")
        if emptied == len(rows):
            what = f"{limit} tokens leave nothing to learn of any {split} row"
            raise ConfigErrors([Problem("task.args.max_length", what, "allow for more")])
    return rows, notes


def _too_long(rows: Dataset, limit: int) -> Iterator[int]:
    """The indices of rows of more than `limit` tokens."""
    import pyarrow.compute as pc

    start = 0
    for batch in rows.with_format("arrow").select_columns("input_ids").iter(batch_size=10_000):
        lengths = pc.list_value_length(batch["input_ids"])
        yield from (start + index for index, length in enumerate(lengths.to_pylist()) if length > limit)
        start += len(batch)


def _samples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, shape: Shape, count: int, *, chat: bool
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The first held-out rows as (prompts, prompts as the model sees them, answers)."""
    found = []
    for row in rows.select(range(min(count, len(rows)))):
        read = shape.read(row, "", chat=chat)
        if isinstance(read, Text):
            half = len(read.completion) // 2
            prompt = read.completion[:half] if read.prompt is None else read.prompt
            answer = read.completion[half:] if read.prompt is None else read.completion
            found.append((prompt, prompt, answer))
            continue
        turns = [*(read.prompt or []), *read.completion]
        last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            continue  # nothing comes before the answer
        rendered = tokenizer.apply_chat_template(
            turns[:last], add_generation_prompt=True, tokenize=False, **read.template_arguments
        )
        found.append((_said(turns[last - 1]), str(rendered), _said(turns[last])))
    prompts, renderings, answers = zip(*found, strict=True) if found else ((), (), ())
    return prompts, renderings, answers


def _said(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(str(part.get("text", "")) for part in content)
