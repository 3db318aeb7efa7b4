"""Supervised fine-tuning: tokens and labels for TRL's SFTTrainer.

Rows have prompts and completions, conversations, or plain text. This module converts rows to tokens and labels, so
errors in rows are found before the model is loaded. TRL cuts, packs and batches the examples.
https://huggingface.co/docs/trl/sft_trainer
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.cache import map_cached, tokenizer_digest
from loraplus_hydra.data.rows import SPLITS, Rows, is_streamed, own_rows
from loraplus_hydra.tasks.base import Base, max_length
from loraplus_hydra.tasks.conversation import Shape, Text, find_shape
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.row_notes import REPORTED, cut_note, omitted_note, stretched_note, template_notes
from loraplus_hydra.tasks.rows import batch_rows, unused_columns_note
from loraplus_hydra.tasks.template import check_template, end_token, loss_rule, set_template
from loraplus_hydra.tasks.tokens import IGNORED, LossRule, encode, render

# With assistant_only_loss, SFTTrainer requires a column of messages. It doesn't read this column if there are labels.
_ANY_TURNS = [{"role": "assistant", "content": ""}]


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    chat: bool | None = None,
    base: Base | None = None,
) -> Examples:
    """Return tokens and labels of rows in any of TRL's shapes.

    With `chat`, a prompt and a completion become a turn of the user and a turn of the assistant. `chat` is None: True
    if the tokenizer has a chat template. Plain text stays plain. Raises ConfigErrors.
    """
    shape = find_shape(rows, data)
    end = end_token(tokenizer, task)
    set_template(tokenizer, task)
    check_template(tokenizer, shape, chat=chat)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    rule, notes = loss_rule(tokenizer, shape, task, chat=chat)
    encoder = _Encoder(shape, tokenizer, rule, end, chat)
    encoded = {split: encoder.encode(rows[split], split) for split in SPLITS}
    notes += unused_columns_note(rows, shape.used(chat=chat))
    limit = max_length(task, tokenizer, base)
    for split in SPLITS:
        notes += _notes(encoded[split], rows[split], split, task, limit, base)
    samples = list(encoder.samples(rows["eval"], task.samples))
    prompts, rendered, references = zip(*samples, strict=True) if samples else ((), (), ())
    return Examples(
        train=encoded["train"].remove_columns(list(REPORTED)),
        eval=encoded["eval"].remove_columns(list(REPORTED)),
        prompts=prompts,
        rendered=rendered,
        references=references,
        max_length=limit,
        special_tokens=shape.text is not None or not chat,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Encoder:
    """Converts rows to tokens and labels."""

    shape: Shape
    tokenizer: PreTrainedTokenizerBase
    rule: LossRule
    end: str  # the token that ends a plain text
    chat: bool

    def encode(self, rows: Rows, split: str) -> Rows:
        """Return the columns input_ids and labels, and the columns of REPORTED.

        With `assistant_only`, the result also has the column messages.
        """
        key = {
            "task": "sft",
            "tokenizer": tokenizer_digest(self.tokenizer),
            "shape": vars(self.shape),
            "chat": self.chat,
            "rule": vars(self.rule),
            "end": self.end,
        }
        features = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), **REPORTED}
        if self.rule.assistant_only:
            features["messages"] = List({"role": Value("string"), "content": Value("string")})

        types = rows.features

        def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            return self._batch(batch_rows(batch, indices, split, types))

        return map_cached(rows, convert, features=Features(features), key=key)

    def _batch(self, rows: Iterator[tuple[dict[str, Any], str]]) -> dict[str, list[Any]]:
        parts = [(self.shape.read(row, place, chat=self.chat), place) for row, place in rows]
        encoded = encode(parts, self.tokenizer, self.rule, self.end)
        columns = {name: [getattr(row, name) for row in encoded] for name in ("input_ids", "labels", *REPORTED)}
        return columns | ({"messages": [_ANY_TURNS] * len(encoded)} if self.rule.assistant_only else {})

    def samples(self, rows: Dataset, count: int) -> Iterator[tuple[str, str, str]]:
        """Yield (prompt, prompt as the model sees it, answer) of the first `count` rows."""
        for row in own_rows(rows.select(range(min(count, len(rows))))):
            part = self.shape.read(row, "", chat=self.chat)
            if isinstance(part, Text):
                half = len(part.completion) // 2
                prompt = part.completion[:half] if part.prompt is None else part.prompt
                yield prompt, prompt, part.completion[half:] if part.prompt is None else part.completion
                continue
            turns = part.turns
            last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
            if last == 0:
                continue  # there is no turn before the answer
            rendered = render(turns[:last], part.template_arguments, self.tokenizer)
            yield turns[last - 1].get("content") or "", rendered, turns[last].get("content") or ""


def _notes(encoded: Rows, rows: Rows, split: str, task: DictConfig, limit: int | None, base: Base | None) -> list[str]:
    """Return notes on rows that are cut or omitted, or whose tokens are merged.

    Raises ConfigErrors if no row is left.
    """
    if is_streamed(encoded):
        return []
    notes, lengths = template_notes(encoded, rows, split), encoded["length"][:]
    notes += stretched_note(lengths, split, limit, base)
    if limit is None or (task.args.get("packing") and task.args.get("packing_strategy") in ("bfd_split", "wrapped")):
        return notes  # nothing is cut
    keep_end = not task.args.get("packing") and task.args.get("truncation_mode") == "keep_end"
    kept = slice(-limit, None) if keep_end else slice(limit)
    long = [index for index, length in enumerate(lengths) if length > limit]
    emptied = sum(all(label == IGNORED for label in encoded[index]["labels"][kept]) for index in long)
    notes += cut_note(len(long), len(encoded), split, limit, keep_end=keep_end)
    return notes + omitted_note(emptied, len(encoded), split, limit)
