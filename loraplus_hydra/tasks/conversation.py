"""Conversations and plain texts of rows for supervised fine-tuning, in any of TRL's shapes.

https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict
from omegaconf import DictConfig

from loraplus_hydra.data.rows import columns
from loraplus_hydra.errors import ConfigErrors, Problem, nearest
from loraplus_hydra.tasks.rows import describe, require_columns, row_error, text_in

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # roles in conversations of {from, value}
_PROMPT, _COMPLETION, _MESSAGES, _TEXT = "prompt_column", "completion_column", "messages_column", "text_column"
_USUAL_NAMES = {_PROMPT: "prompt", _COMPLETION: "completion", _MESSAGES: "messages", _TEXT: "text"}
_OTHER_COLUMN = "conversations"  # another usual name for messages
TOOLS, TEMPLATE_ARGUMENTS = "tools", "chat_template_kwargs"  # columns that TRL passes to the template


@dataclass(frozen=True)
class Text:
    """A plain text to learn, after a prompt or without one."""

    completion: str
    prompt: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns to learn, after a prompt of turns or without one."""

    completion: list[Message]
    prompt: list[Message] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)  # tools, and others that the template takes


@dataclass(frozen=True)
class Shape:
    """The columns that a row's text or conversation is read from.

    A prompt and its completion, or messages, or text; the others are None.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def has_prompt(self) -> bool:
        return self.prompt is not None

    def read(self, row: Mapping[str, Any], place: str, *, chat: bool) -> Text | Conversation:
        """Return a row's text or conversation; with `chat` texts become turns. Raises ConfigErrors."""
        if self.text is not None:
            return Text(text_in(row, self.text, place, empty=False))
        if self.messages is not None:
            messages = _messages(row[self.messages], self.messages, place)
            return Conversation(messages, template_arguments=_template_arguments(row, place))
        assert self.prompt is not None
        assert self.completion is not None
        if any(isinstance(row[column], list) for column in (self.prompt, self.completion)):
            prompt = _messages(row[self.prompt], self.prompt, place)
            completion = _messages(row[self.completion], self.completion, place)
            return Conversation(completion, prompt, _template_arguments(row, place))
        question = text_in(row, self.prompt, place)
        answer = text_in(row, self.completion, place, empty=False)
        if not chat:
            return Text(answer, question)
        return Conversation(
            completion=[{"role": "assistant", "content": answer}],
            prompt=[{"role": "user", "content": question}],
            template_arguments=_template_arguments(row, place),
        )


def find_shape(rows: DatasetDict, data: DictConfig) -> Shape:
    """Return the shape that fits the rows' columns and their names in `data`.

    Raises ConfigErrors if no shape fits, or several do.
    """
    available = columns(rows["train"])
    names = {key: data.get(key) for key in _USUAL_NAMES}
    renamed = {f"data.{key}": name for key, name in names.items() if name not in (None, _USUAL_NAMES[key])}
    require_columns(rows, renamed)
    if names[_MESSAGES] == "messages" and "messages" not in available and _OTHER_COLUMN in available:
        names[_MESSAGES] = _OTHER_COLUMN
    fitting = {}
    if names[_PROMPT] in available and names[_COMPLETION] in available:
        fitting["prompt and completion"] = Shape(prompt=names[_PROMPT], completion=names[_COMPLETION])
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
    require_columns(rows, used)
    return shape


def _no_shape(names: dict[str, Any], available: list[str]) -> Problem:
    fix = f"the columns are: {', '.join(available)}"
    missing = [key for key in (_PROMPT, _COMPLETION) if names[key] not in available]
    if len(missing) == 1:
        name = names[missing[0]]
        return Problem(f"data.{missing[0]}", f"the rows have no column '{name}'{nearest(str(name), available)}", fix)
    wanted = ", ".join(f"{key}={name}" for key, name in names.items() if name is not None) or "none is named"
    fix += "; name yours: data.prompt_column=... data.completion_column=..., or data.messages_column=..."
    return Problem("data", f"the rows have none of the columns looked for ({wanted})", fix)


def _messages(value: Any, column: str, place: str) -> list[Message]:
    """Return a list of messages, each with a known role and content. Raises ConfigErrors."""
    if not isinstance(value, list):
        raise row_error(place, column, f"is {describe(value)}, not a list of messages")
    if not value:
        raise row_error(place, column, "is an empty list, so there is nothing to learn")
    return [_message(message, column, f"{place}, message {number}") for number, message in enumerate(value, start=1)]


def _message(message: Any, column: str, place: str) -> Message:
    if not isinstance(message, dict):
        raise row_error(place, column, f"holds {describe(message)}, where a message is {{role: ..., content: ...}}")
    # A column has one type, so a message has null for keys that only others have.
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message = {"role": _OTHER_NAMES.get(role, role), "content": message.pop("value", None), **message}
    role = message.get("role")
    if role is None:
        raise row_error(place, column, "holds a message without a role", f"one of: {', '.join(ROLES)}")
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise row_error(place, column, f"holds a message of the role '{role}'{hint}", f"one of: {', '.join(ROLES)}")
    _check_content(message, column, place)
    return message


def _check_content(message: Message, column: str, place: str) -> None:
    content, calls_tools = message.get("content"), bool(message.get("tool_calls"))
    if content is None and not calls_tools:
        raise row_error(place, column, "holds a message without content")
    if content is not None and not isinstance(content, (str, list)):
        raise row_error(place, column, f"holds a message whose content is {describe(content)}, not text")
    if message["role"] == "assistant" and content is not None and not content and not calls_tools:
        raise row_error(place, column, "holds an empty message of the assistant, so there is nothing to learn")


def _template_arguments(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the template's arguments besides the messages, from the columns that TRL uses."""
    tools = row.get(TOOLS)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise row_error(place, TOOLS, f"is not JSON: {error.msg}") from None
    others = row.get(TEMPLATE_ARGUMENTS) or {}
    if not isinstance(others, dict):
        raise row_error(place, TEMPLATE_ARGUMENTS, f"is {describe(others)}, not an object")
    return {"tools": tools, **others} if tools else dict(others)
