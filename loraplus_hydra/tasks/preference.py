"""Preferences in rows: a prompt with a chosen and a rejected answer.

The answers are texts, messages, or whole conversations that begin with the prompt.
https://huggingface.co/docs/trl/dataset_formats#preference
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig
from trl.data_utils import extract_prompt

from loraplus_hydra.data.rows import columns
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.conversation import Conversation, Shape, Text, as_turns, prompt_shape
from loraplus_hydra.tasks.messages import Message, Messages, holds_messages, question, read_messages
from loraplus_hydra.tasks.rows import describe, require_columns, row_error, text_in

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # the form of dialogues in HH-RLHF
_SILENT = "has a message without loss, but a preference compares whole answers"
_NOTHING_SHARED = "and the rejected answer begin with no common prompt"


@dataclass(frozen=True)
class Preference:
    """The chosen and the rejected answer to the same prompt."""

    chosen: Text | Conversation
    rejected: Text | Conversation


@dataclass(frozen=True)
class PreferenceShape:
    """The columns that a row's preference is read from."""

    chosen: str
    rejected: str
    before: Shape  # the prompt's columns; all are None if the answers contain the prompt

    def used(self, *, chat: bool) -> set[str]:
        """Return the names of the columns that this shape reads."""
        return {self.chosen, self.rejected} | self.before.used(chat=chat)

    def read(self, row: Mapping[str, Any], place: str, *, chat: bool) -> Preference:
        """Return a row's preference. With `chat`, texts become turns. Raises ConfigErrors."""
        chosen, rejected = self._side(row, self.chosen, place), self._side(row, self.rejected, place)
        if isinstance(chosen, str) is not isinstance(rejected, str):
            raise row_error(
                place, self.rejected, "differs in kind from the chosen answer: one is text, the other is messages"
            )
        if chosen == rejected:
            raise row_error(place, self.rejected, "is equal to the chosen answer, so there is no preference")
        prompt: str | Messages | None = self.before.question(row, place)
        if isinstance(prompt, str) and not prompt.strip():
            raise row_error(place, self._prompt_column, "is empty, so there is nothing to answer")
        if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
            if not chat:
                return self._of_texts(chosen, rejected, place)
            chosen, rejected = self._dialogue(chosen, place), self._dialogue(rejected, place)
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str) and not chat:
            return Preference(Text(chosen, prompt), Text(rejected, prompt))
        if not chat:
            raise ConfigErrors([needs_template(place)])
        before = None if prompt is None else as_turns(prompt, "user").turns
        return self._of_turns(before, [as_turns(side, "assistant").turns for side in (chosen, rejected)], row, place)

    def ask(self, row: Mapping[str, Any], place: str, *, chat: bool) -> str | Conversation:
        """Return the prompt of a row's preference. Raises ConfigErrors."""
        chosen = self.read(row, place, chat=chat).chosen
        if isinstance(chosen, Text):
            return str(chosen.prompt)
        return Conversation(list(chosen.prompt or []), None, chosen.template_arguments)

    def _side(self, row: Mapping[str, Any], column: str, place: str) -> str | Messages:
        value = row[column]
        if not holds_messages(value):
            return text_in(row, column, place, empty=False)
        messages = read_messages(value, column, place)
        if messages.turns[-1]["role"] != "assistant":
            raise row_error(place, column, f"ends with a message with the role '{messages.turns[-1]['role']}'")
        if messages.silent:
            raise row_error(place, column, _SILENT)
        return messages

    def _dialogue(self, text: str, place: str) -> Messages:
        """Return the turns of a text that also contains the prompt."""
        turns = read_dialogue(text)
        if turns is None:
            fix = "set the column with the prompt (data.prompt_column=...), or set task.chat=false to use "
            fix += "the common beginning of both answers as the prompt"
            raise row_error(place, self.chosen, "has no prompt", fix)
        return Messages(turns)

    def _of_texts(self, chosen: str, rejected: str, place: str) -> Preference:
        """Return the preference of two texts that begin with the prompt."""
        if chosen[0] != rejected[0]:
            raise row_error(place, self.chosen, _NOTHING_SHARED)
        prompt = str(extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"])
        if read_dialogue(chosen) and read_dialogue(rejected):
            # The answers may begin with the same words, so the prompt must end before an answer.
            ends = [match.end() for match in _TURN.finditer(prompt) if match[1] == "Assistant"]
            if not ends:
                raise row_error(place, self.chosen, _NOTHING_SHARED)
            prompt = prompt[: ends[-1]]
        elif chosen.startswith(rejected) or rejected.startswith(chosen):
            what = "and the rejected answer: one begins with all of the other, so it is unknown where the prompt ends"
            raise row_error(place, self.chosen, what, "put the prompt in a column of its own (data.prompt_column=...)")
        return Preference(Text(chosen[len(prompt) :], prompt), Text(rejected[len(prompt) :], prompt))

    def _of_turns(
        self, prompt: list[Message] | None, sides: list[list[Message]], row: Mapping[str, Any], place: str
    ) -> Preference:
        """Return the preference of two lists of messages. The lists may begin with the prompt."""
        if sides[0][0]["role"] != "assistant" or sides[1][0]["role"] != "assistant":
            parts: dict[str, Any] = extract_prompt({"chosen": sides[0], "rejected": sides[1]})
            sides, prompt = [parts["chosen"], parts["rejected"]], self._joined(prompt, parts["prompt"], place)
        if not prompt:
            raise row_error(place, self.chosen, _NOTHING_SHARED)
        if prompt[-1]["role"] == "assistant" and sides[0][0]["role"] == sides[1][0]["role"] == "assistant":
            raise row_error(place, str(self._prompt_column), "ends with an answer, but must end with a question")
        chosen, rejected = (self.before.conversation(Messages(prompt), Messages(side), row, place) for side in sides)
        return Preference(chosen, rejected)

    @property
    def _prompt_column(self) -> str:
        return self.before.prompt or self.before.messages or self.chosen

    def _joined(self, before: list[Message] | None, held: list[Message], place: str) -> list[Message]:
        """Return the whole prompt: the part in other columns, then the part in the answers."""
        texts = [_text(turn) for turn in held]
        if not before or all(_text(turn) in texts for turn in before):
            return held
        if before[-1]["role"] == "user" or _text(before[0]) in texts:
            key = "prompt_column" if self.before.prompt else "messages_column"
            what = "is different from the prompt with which both answers begin"
            raise row_error(place, self._prompt_column, what, f"set data.{key}=null to use only the answers' prompt")
        return before + held


def read_dialogue(text: str) -> list[Message] | None:
    """Return the turns of a text in HH-RLHF's form, or None for another form."""
    before, *parts = _TURN.split(text)
    if before or len(parts) < 4 or parts[0] != "Human" or parts[-2] != "Assistant" or not parts[-1].strip():
        return None
    speakers, texts = parts[::2], parts[1::2]
    turns = zip(speakers, texts, strict=True)
    return [{"role": _SPEAKERS[speaker], "content": text.strip()} for speaker, text in turns]


def find_preference_shape(rows: DatasetDict, data: DictConfig) -> PreferenceShape:
    """Return the shape that fits the rows' columns and the columns' names in `data`.

    Raises ConfigErrors if the rows have no such columns.
    """
    names = {name: data.get(f"{name}_column") or name for name in ("chosen", "rejected")}
    require_columns(rows, {f"data.{name}_column": column for name, column in names.items()})
    return PreferenceShape(**names, before=prompt_shape(rows, data))


def has_preferences(rows: DatasetDict, data: DictConfig) -> bool:
    """Return True if the rows have columns with a chosen and a rejected answer."""
    return {data.get(f"{name}_column") or name for name in ("chosen", "rejected")} <= {*columns(rows["train"])}


def judged(part: Text | Conversation, column: str, place: str) -> Text | Conversation:
    """Split a text or conversation into prompt and answer: the turns after the last question.

    Raises ConfigErrors if there is no prompt or no answer, or if a part of the answer has no loss.
    """
    if isinstance(part, Conversation) and part.prompt is None:
        asked = len(question(part.turns))
        part = replace(part, prompt=part.turns[:asked], completion=part.turns[asked:])
    if not part.prompt or not part.completion:
        raise row_error(place, column, "has no prompt before an answer of the assistant")
    if isinstance(part, Conversation) and any(number >= len(part.prompt) for number in part.silent):
        raise row_error(place, column, _SILENT)
    return part


def _text(turn: Message) -> Any:
    content = turn.get("content")
    return content.strip() if isinstance(content, str) else describe(content)


def needs_template(place: str) -> Problem:
    """Return the Problem about messages that need a chat template."""
    what = f"{place} has messages, which need a chat template, but no template is used"
    return Problem("task.chat", what, "set task.chat=null, and use a tokenizer with a chat template")
