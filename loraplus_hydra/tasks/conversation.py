"""Conversations and plain texts of rows for supervised fine-tuning, in any of TRL's shapes.

https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig

from loraplus_hydra.data.rows import CONTINUES, columns, may_have
from loraplus_hydra.errors import ConfigErrors, Problem, nearest
from loraplus_hydra.tasks.messages import (
    Message,
    Messages,
    holds_messages,
    json_value,
    question,
    read_messages,
    with_system,
)
from loraplus_hydra.tasks.rows import describe, require_columns, row_error, text_in

_PROMPT, _COMPLETION, _MESSAGES, _TEXT = "prompt_column", "completion_column", "messages_column", "text_column"
_USUAL_NAMES = {_PROMPT: "prompt", _COMPLETION: "completion", _MESSAGES: "messages", _TEXT: "text"}
_OTHER_COLUMN = "conversations"  # another usual name for messages
# Alpaca's columns: the prompt, its optional second part, and the answer
_INSTRUCTION, _INPUT, _OUTPUT = "instruction", "input", "output"
TOOLS, TEMPLATE_ARGUMENTS = "tools", "chat_template_kwargs"  # columns that TRL passes to the template
FUNCTIONS = "functions"  # OpenAI's old column, before `tools`
_OWN_ARGUMENTS = {  # arguments of apply_chat_template that this program sets
    *("tokenizer", "messages", "conversation", "chat_template", "add_generation_prompt"),
    *("tokenize", "return_dict", "return_assistant_tokens_mask"),
}
# Usual names of columns in lower case, for suggestions in messages.
_LIKE_PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem", "user", "human", "article", "source")
_LIKE_COMPLETIONS = (
    *("completion", "answer", "response", "output", "solution", "assistant", "gpt", "summary", "target", "chosen"),
)
_LIKE_MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")
SYSTEM = "system"  # a column with the conversation's system message
CONVERSATION_COLUMNS = {SYSTEM, TOOLS, FUNCTIONS, TEMPLATE_ARGUMENTS}  # read in addition to a prompt or messages


@dataclass(frozen=True)
class Text:
    """A plain text to learn, with or without a prompt."""

    completion: str
    prompt: str | None = None
    continues: bool = False  # the next row continues the text


@dataclass(frozen=True)
class Conversation:
    """Turns to learn, with or without a prompt of turns."""

    completion: list[Message]
    prompt: list[Message] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)  # tools, and the template's other arguments
    silent: frozenset[int] = frozenset()  # numbers of turns without loss; the prompt's first turn has number 0

    @property
    def turns(self) -> list[Message]:
        return [*(self.prompt or []), *self.completion]


@dataclass(frozen=True)
class Shape:
    """The columns that a row's text or conversation is read from.

    A shape has a prompt and a completion, or messages, or text. The other fields are None.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    input: str | None = None  # a second part of the prompt, which may be empty

    @property
    def has_prompt(self) -> bool:
        return self.prompt is not None

    def read(self, row: Mapping[str, Any], place: str, *, chat: bool) -> Text | Conversation:
        """Return a row's text or conversation. With `chat`, texts become turns. Raises ConfigErrors."""
        if self.text is not None:
            return Text(text_in(row, self.text, place, empty=False), continues=bool(row.get(CONTINUES)))
        if self.messages is not None:
            return self.conversation(None, self._messages(row, self.messages, place), row, place)
        assert self.completion is not None
        prompt, answer = self._prompt(row, place), self._answer(row, place)
        if isinstance(prompt, str) and isinstance(answer, str) and not chat:
            return Text(answer, prompt)
        return self.conversation(as_turns(prompt, "user"), as_turns(answer, "assistant"), row, place)

    def ask(self, row: Mapping[str, Any], place: str, *, chat: bool) -> str | Text | Conversation:
        """Return a row's prompt for the model, without the answer. Raises ConfigErrors."""
        if self.text is not None:
            return Text(text_in(row, self.text, place, empty=False))  # a plain text never becomes a turn
        asked = self.question(row, place)
        if isinstance(asked, str) and not chat:
            return asked
        if self.messages is not None and isinstance(asked, Messages):
            asked = Messages(question(asked.turns))
            if not asked.turns:
                raise row_error(place, self.messages, "has only answers of the assistant")
        assert asked is not None
        return self.conversation(None, as_turns(asked, "user"), row, place)

    def question(self, row: Mapping[str, Any], place: str) -> str | Messages | None:
        """Return a row's prompt or messages, or None if it has no column for them. Raises ConfigErrors."""
        if self.messages is not None:
            return self._messages(row, self.messages, place)
        return None if self.prompt is None else self._prompt(row, place)

    def used(self, *, chat: bool) -> set[str]:
        """Return the names of the columns that this shape reads."""
        own = {name for key, name in asdict(self).items() if isinstance(name, str)}
        return own | CONVERSATION_COLUMNS if self.messages is not None or chat else own

    def conversation(
        self, prompt: Messages | None, completion: Messages, row: Mapping[str, Any], place: str
    ) -> Conversation:
        """Join a row's messages with its system message and template arguments, if there are any."""
        first = with_system(prompt or completion, row.get(SYSTEM), SYSTEM, place)
        arguments = _template_arguments(row, place)
        if prompt is None:
            return Conversation(first.turns, None, arguments, first.silent)
        later = frozenset(len(first.turns) + number for number in completion.silent)
        return Conversation(completion.turns, first.turns, arguments, first.silent | later)

    def _prompt(self, row: Mapping[str, Any], place: str) -> str | Messages:
        assert self.prompt is not None
        if holds_messages(row[self.prompt]):
            return self._messages(row, self.prompt, place)
        prompt = text_in(row, self.prompt, place)
        further = row.get(self.input) if self.input is not None else None
        if further is not None and not isinstance(further, str):
            raise row_error(place, str(self.input), f"is {describe(further)}, not text")
        return f"{prompt}\n\n{further}" if further else prompt

    def _answer(self, row: Mapping[str, Any], place: str) -> str | Messages:
        assert self.completion is not None
        if holds_messages(row[self.completion]):
            return self._messages(row, self.completion, place)
        return text_in(row, self.completion, place, empty=False)

    def _messages(self, row: Mapping[str, Any], column: str, place: str) -> Messages:
        return read_messages(row[column], column, place)


def as_turns(value: str | Messages, role: str) -> Messages:
    """Return messages unchanged, and a text as one message with this `role`."""
    return Messages([{"role": role, "content": value}]) if isinstance(value, str) else value


def find_shape(rows: DatasetDict, data: DictConfig, *, prompts_only: bool = False) -> Shape:
    """Return the shape that fits the rows' columns and the columns' names in `data`.

    Raises ConfigErrors if no shape or several shapes fit.
    """
    available, names = columns(rows["train"]), _column_names(rows, data)
    fitting = {}
    if names[_PROMPT] in available and (names[_COMPLETION] in available or prompts_only):
        further = _further(names, rows)
        fitting["prompt and completion"] = Shape(prompt=names[_PROMPT], completion=names[_COMPLETION], input=further)
    if names[_MESSAGES] in available:
        fitting["messages"] = Shape(messages=names[_MESSAGES])
    if names[_TEXT] in available:
        fitting["text"] = Shape(text=names[_TEXT])
    if len(fitting) > 1:
        fix = f"set the wrong one to null, for example data.{_TEXT if 'text' in fitting else _MESSAGES}=null"
        raise ConfigErrors([Problem("data", f"the rows can be read as {' or as '.join(fitting)}", fix)])
    if not fitting:
        raise ConfigErrors([_no_shape(names, available)])
    shape = next(iter(fitting.values()))
    used = {f"data.{key}": name for key, name in names.items() if name is not None and name in vars(shape).values()}
    if prompts_only:
        used.pop(f"data.{_COMPLETION}", None)
    require_columns(rows, used)
    return shape


def prompt_shape(rows: DatasetDict, data: DictConfig) -> Shape:
    """Return the shape of the columns with prompts, possibly without any column.

    Raises ConfigErrors if a split lacks the column.
    """
    available, names = columns(rows["train"]), _column_names(rows, data)
    key = next((key for key in (_PROMPT, _MESSAGES) if names[key] in available), None)
    if key is None:
        return Shape()
    require_columns(rows, {f"data.{key}": names[key]})
    if key == _MESSAGES:
        return Shape(messages=names[key])
    return Shape(prompt=names[key], input=_further(names, rows))


def _column_names(rows: DatasetDict, data: DictConfig) -> dict[str, Any]:
    """Return the name of each of the config's columns, or another usual name that the rows have.

    Raises ConfigErrors if the rows don't have a column that the config names.
    """
    available = columns(rows["train"])
    # A callable of one's own need not name columns that have the usual names.
    names = {key: data.get(key, usual) for key, usual in _USUAL_NAMES.items()}
    renamed = {f"data.{key}": name for key, name in names.items() if name not in (None, _USUAL_NAMES[key])}
    require_columns(rows, renamed)
    if names[_MESSAGES] == "messages" and "messages" not in available and _OTHER_COLUMN in available:
        names[_MESSAGES] = _OTHER_COLUMN
    usual = names[_PROMPT] == "prompt" and names[_COMPLETION] == "completion"
    if usual and not {"prompt", "completion"} & {*available}:
        names |= {key: name for key, name in ((_PROMPT, _INSTRUCTION), (_COMPLETION, _OUTPUT)) if name in available}
    return names


def _further(names: Mapping[str, Any], rows: DatasetDict) -> str | None:
    """Return the column with a second part of the prompt, or None."""
    return _INPUT if names[_PROMPT] == _INSTRUCTION and may_have(rows, [_INPUT]) else None


def _no_shape(names: dict[str, Any], available: list[str]) -> Problem:
    fix = f"the columns are {', '.join(available)}"
    missing = [key for key in (_PROMPT, _COMPLETION) if names[key] not in available]
    if len(missing) == 1:
        name = names[missing[0]]
        return Problem(f"data.{missing[0]}", f"the rows have no column '{name}'{nearest(str(name), available)}", fix)
    if len(available) == 1 and (mark := next((each for each in ";|\t" if each in available[0]), "")):
        fix += f"; if {mark!r} separates the columns, set data.delimiter=" + (
            "tab" if mark == "\t" else f"'\"{mark}\"'"
        )
    wanted = ", ".join(f"{key}={name}" for key, name in names.items() if name is not None) or "no column is set"
    fix += f"; set your columns: {_suggested(available)}"
    return Problem("data", f"the rows have none of the expected columns ({wanted})", fix)


def _suggested(available: Sequence[str]) -> str:
    """Return overrides that suggest columns with prompt and completion, or with messages."""
    lower = {name.casefold(): name for name in reversed(available)}
    prompt, completion, messages = (
        next((lower[name] for name in names if name in lower), "...")
        for names in (_LIKE_PROMPTS, _LIKE_COMPLETIONS, _LIKE_MESSAGES)
    )
    pair = f"data.prompt_column={prompt} data.completion_column={completion}"
    return f"data.messages_column={messages}" if messages != "..." else f"{pair}, or data.messages_column=..."


def _template_arguments(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the template's arguments except the messages, from TRL's columns."""
    tools = json_value(row.get(TOOLS) or None, TOOLS, place)
    if not tools and (functions := json_value(row.get(FUNCTIONS) or None, FUNCTIONS, place)):
        if not isinstance(functions, list):
            raise row_error(place, FUNCTIONS, f"is {describe(functions)}, not a list of functions")
        tools = [{"type": "function", "function": each} for each in functions]
    others = row.get(TEMPLATE_ARGUMENTS) or {}
    if not isinstance(others, dict):
        raise row_error(place, TEMPLATE_ARGUMENTS, f"is {describe(others)}, not an object")
    if taken := sorted(_OWN_ARGUMENTS & others.keys()):
        raise row_error(
            place, TEMPLATE_ARGUMENTS, f"has the key '{taken[0]}', which this program sets", "remove the key"
        )
    return {"tools": tools, **others} if tools else dict(others)
