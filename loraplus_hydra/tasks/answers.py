"""Prompts with answers, in the columns of TRL's preference trainers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.cache import map_cached, tokenizer_digest
from loraplus_hydra.data.exact_json import ExactJson, json_text
from loraplus_hydra.data.rows import SPLITS, Rows, is_streamed, may_have, own_rows
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.base import Base
from loraplus_hydra.tasks.conversation import FUNCTIONS, TEMPLATE_ARGUMENTS, TOOLS, Conversation, Text
from loraplus_hydra.tasks.row_notes import REPORTED, cut_note, omitted_note, stretched_note, template_notes
from loraplus_hydra.tasks.rows import batch_rows
from loraplus_hydra.tasks.template import end_token
from loraplus_hydra.tasks.tokens import IGNORED, Encoded, LossRule, encode, render

Answers = Mapping[str, Text | Conversation]  # TRL's column -> the answer; all answers have the same prompt
_PROMPT_LENGTH = "prompt_length"  # column with the number of a prompt's tokens, for notes
_RULE = LossRule(completion_only=True, assistant_only=False)  # TRL's loss is on the tokens of the answers


@dataclass(frozen=True)
class AnswerReader:
    """Converts rows to TRL's columns: the prompt, the answers, and others."""

    read: Callable[[Mapping[str, Any], str], tuple[Answers, dict[str, Any]]]  # (row, place) -> answers, other columns
    answers: tuple[str, ...]  # names of the answers' columns
    others: Features = field(default_factory=lambda: Features({}))  # types of the other columns
    chat: bool = False
    key: Mapping[str, Any] = field(default_factory=dict)  # everything on which `read` depends

    def columns(self, rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: DictConfig) -> dict[str, Rows]:
        """Return the splits with TRL's columns and the columns of REPORTED. Raises ConfigErrors."""
        end = end_token(tokenizer, task)
        templated = self.chat and may_have(rows, (TOOLS, FUNCTIONS, TEMPLATE_ARGUMENTS))
        # JSON keeps a message unchanged. Arrow would give every message the keys of all messages.
        texts = {name: ExactJson() if self.chat else Value("string") for name in ("prompt", *self.answers)}
        arguments = {TOOLS: Value("string"), TEMPLATE_ARGUMENTS: ExactJson()} if templated else {}
        features = Features({**texts, **arguments, **self.others, **REPORTED, _PROMPT_LENGTH: Value("int32")})
        key = {**self.key, "tokenizer": tokenizer_digest(tokenizer), "end": end, "chat": self.chat}

        def convert_in(split: str) -> Callable[..., dict[str, list[Any]]]:
            types = rows[split].features

            def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
                lines = batch_rows(batch, indices, split, types)
                read = [(self.read(row, place), place) for row, place in lines]
                parts = [(part, place) for (answers, _), place in read for part in answers.values()]
                encoded = iter(encode(parts, tokenizer, _RULE, end))
                made = [
                    _columns(answers, templated) | others | _reported([next(encoded) for _ in answers])
                    for (answers, others), _ in read
                ]
                return {name: [_stored(line[name], type) for line in made] for name, type in features.items()}

            return convert

        return {split: map_cached(rows[split], convert_in(split), features=features, key=key) for split in SPLITS}

    def samples(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the fields of `Examples` that samples need: each row's prompt and first answer."""
        shown = list(self._shown(rows, tokenizer))
        names = ("prompts", "rendered", "references")
        return dict(zip(names, zip(*shown, strict=True), strict=True)) if shown else {}

    def _shown(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, str]]:
        for row in own_rows(rows):
            part = self.read(row, "")[0][self.answers[0]]
            if isinstance(part, Text):
                yield str(part.prompt), str(part.prompt), part.completion
                continue
            prompt = part.prompt or []
            rendered = render(prompt, part.template_arguments, tokenizer)
            yield prompt[-1].get("content") or "", rendered, part.completion[-1].get("content") or ""


def answer_notes(
    encoded: Mapping[str, Rows], rows: DatasetDict, limit: int | None, task: DictConfig, base: Base | None
) -> list[str]:
    """Return notes on rows that the template changes, and on rows that are too long."""
    notes = []
    for split in SPLITS:
        part = encoded[split]
        if is_streamed(part):
            continue
        lengths = part["length"][:]
        long = sum(limit is not None and length > limit for length in lengths)
        keep_end = task.args.get("truncation_mode") == "keep_end"
        notes += template_notes(part, rows[split], split) + stretched_note(lengths, split, limit, base)
        notes += cut_note(long, len(lengths), split, limit, keep_end=keep_end)
        if limit is not None and not keep_end:
            emptied = sum(length >= limit for length in part[_PROMPT_LENGTH][:])
            notes += omitted_note(emptied, len(lengths), split, limit)
    return notes


def without_reports(rows: Rows) -> Any:
    """Return the rows without the columns of REPORTED, which the Trainer doesn't know."""
    return rows.remove_columns([*REPORTED, _PROMPT_LENGTH])


def uses_template(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Return `chat`. If it is None, return True if the tokenizer has a chat template.

    Raises ConfigErrors if `chat` is True but there is no template.
    """
    if chat and not tokenizer.chat_template:
        raise ConfigErrors([Problem("task.chat", "the tokenizer has no chat template", "set task.chat=false")])
    return bool(tokenizer.chat_template) if chat is None else chat


def _stored(value: Any, type: Any) -> Any:
    """Return a value in the form in which a column of this type stores it."""
    return json_text(value) if isinstance(type, ExactJson) and value is not None else value


def _columns(answers: Answers, templated: bool) -> dict[str, Any]:
    """Return a row's prompt and answers. With `templated`, also return the template's other arguments."""
    first = next(iter(answers.values()))
    row = {"prompt": first.prompt, **{name: part.completion for name, part in answers.items()}}
    if not templated:
        return row
    arguments = dict(first.template_arguments) if isinstance(first, Conversation) else {}
    tools = arguments.pop(TOOLS, None)
    return row | {TOOLS: tools and json.dumps(tools), TEMPLATE_ARGUMENTS: arguments}


def _reported(answers: list[Encoded]) -> dict[str, Any]:
    """Return a row's properties for notes. A row has a property if any of its answers has it."""
    flags = {name: any(getattr(answer, name) for answer in answers) for name in REPORTED if name != "unread"}
    unread = sorted({key for answer in answers for key in answer.unread})
    # TRL leaves out rows whose prompt alone fills the limit.
    prompt = min(_first_learnt(answer.labels) for answer in answers)
    return flags | {"unread": unread, "length": max(answer.length for answer in answers), _PROMPT_LENGTH: prompt}


def _first_learnt(labels: list[int]) -> int:
    return next((number for number, label in enumerate(labels) if label != IGNORED), len(labels))
