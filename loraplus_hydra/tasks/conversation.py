"""Rows of supervised fine-tuning as the conversations or plain texts that they hold, in any shape that TRL knows.

https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraplus_hydra.data.rows import columns
from loraplus_hydra.errors import ConfigErrors, Problem, nearest
from loraplus_hydra.tasks.rows import described, require_columns, text_in, wrong_value

if TYPE_CHECKING:
    from datasets import DatasetDict
    from omegaconf import DictConfig

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # of roles, in conversations of {from, value}
_PROMPT, _COMPLETION, _MESSAGES, _TEXT = "prompt_column", "completion_column", "messages_column", "text_column"
_USUAL_NAMES = {_PROMPT: "prompt", _COMPLETION: "completion", _MESSAGES: "messages", _TEXT: "text"}
_SHARED_COLUMN = "conversations"  # what such data sets call their messages
TOOLS, TEMPLATE_ARGUMENTS = "tools", "chat_template_kwargs"  # columns that TRL hands on to the template


@dataclass(frozen=True)
class Text:
    """A plain text to learn, after a prompt or without one."""

    completion: str
    prompt: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns to learn, after turns that set the scene or without any."""

    completion: list[Message]
    prompt: list[Message] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)  # tools, and what else the template takes


@dataclass(frozen=True)
class Shape:
    """Which columns hold what: a prompt and its completion, whole conversations, or plain text."""

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def has_prompt(self) -> bool:
        return self.prompt is not None

    def read(self, row: Mapping[str, Any], place: str, *, chat: bool) -> Text | Conversation:
        """What a row holds; with `chat` texts become turns. Raises ConfigErrors saying what is wrong where."""
        if self.text is not None:
            return Text(text_in(row, self.text, place, empty=False))
        if self.messages is not None:
            messages = _messages(row[self.messages], self.messages, place)
            return Conversation(messages, template_arguments=_template_arguments(row, place))
        assert self.prompt is not None
        assert self.completion is not None
        prompt, completion = row[self.prompt], row[self.completion]
        if isinstance(prompt, list) or isinstance(completion, list):
            asked = _messages(prompt, self.prompt, place)
            answered = _messages(completion, self.completion, place)
            return Conversation(answered, asked, _template_arguments(row, place))
        prompt = text_in(row, self.prompt, place)
        completion = text_in(row, self.completion, place, empty=False)
        if not chat:
            return Text(completion, prompt)
        return Conversation(
            completion=[{"role": "assistant", "content": completion}],
            prompt=[{"role": "user", "content": prompt}],
            template_arguments=_template_arguments(row, place),
        )


def shape_of(rows: DatasetDict, data: DictConfig) -> Shape:
    """The shape whose columns, as `data` names them, the rows have. Raises ConfigErrors for none, and for several."""
    there = columns(rows["train"])
    names = {key: data.get(key) for key in _USUAL_NAMES}
    renamed = {f"data.{key}": name for key, name in names.items() if name not in (None, _USUAL_NAMES[key])}
    require_columns(rows, renamed)
    if names[_MESSAGES] == "messages" and "messages" not in there and _SHARED_COLUMN in there:
        names[_MESSAGES] = _SHARED_COLUMN
    fitting = {}
    if names[_PROMPT] in there and names[_COMPLETION] in there:
        fitting["prompt and completion"] = Shape(prompt=names[_PROMPT], completion=names[_COMPLETION])
    if names[_MESSAGES] in there:
        fitting["messages"] = Shape(messages=names[_MESSAGES])
    if names[_TEXT] in there:
        fitting["text"] = Shape(text=names[_TEXT])
    if len(fitting) > 1:
        fix = f"set the one not meant to null, for example data.{_TEXT if 'text' in fitting else _MESSAGES}=null"
        raise ConfigErrors([Problem("data", f"the rows can be read as {' or as '.join(fitting)}", fix)])
    if not fitting:
        raise ConfigErrors(_no_shape(names, there))
    shape = next(iter(fitting.values()))
    used = {f"data.{key}": name for key, name in names.items() if name is not None and name in vars(shape).values()}
    require_columns(rows, used)
    return shape


def _no_shape(names: dict[str, Any], there: list[str]) -> list[Problem]:
    fix = f"the columns are: {', '.join(there)}"
    missing = [key for key in (_PROMPT, _COMPLETION) if names[key] not in there]
    if len(missing) == 1:
        name = names[missing[0]]
        return [Problem(f"data.{missing[0]}", f"the rows have no column '{name}'{nearest(str(name), there)}", fix)]
    wanted = ", ".join(f"{key}={name}" for key, name in names.items() if name is not None) or "none is named"
    fix += "; name yours: data.prompt_column=... data.completion_column=..., or data.messages_column=..."
    return [Problem("data", f"the rows have none of the columns looked for ({wanted})", fix)]


def _messages(value: Any, column: str, place: str) -> list[Message]:
    """A list of messages, each with a known role and content."""
    if not isinstance(value, list):
        raise wrong_value(place, column, f"is {described(value)}, not a list of messages")
    if not value:
        raise wrong_value(place, column, "is an empty list, so there is nothing to learn")
    return [_message(message, column, f"{place}, message {number}") for number, message in enumerate(value, start=1)]


def _message(message: Any, column: str, place: str) -> Message:
    if not isinstance(message, dict):
        raise wrong_value(place, column, f"holds {described(message)}, where a message is {{role: ..., content: ...}}")
    # Columns of one type fill what a message lacks with null.
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message = {"role": _OTHER_NAMES.get(role, role), "content": message.pop("value", None), **message}
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise wrong_value(place, column, "holds a message without a role", f"one of: {', '.join(ROLES)}")
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise wrong_value(place, column, f"holds a message of the role '{role}'{hint}", f"one of: {', '.join(ROLES)}")
    if content is None and not message.get("tool_calls"):
        raise wrong_value(place, column, "holds a message without content")
    if content is not None and not isinstance(content, (str, list)):
        raise wrong_value(place, column, f"holds a message whose content is {described(content)}, not text")
    if role == "assistant" and content is not None and not content and not message.get("tool_calls"):
        raise wrong_value(place, column, "holds an empty message of the assistant, so there is nothing to learn")
    return message


def _template_arguments(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What of a row goes to the template beside the messages, as with TRL."""
    tools = row.get(TOOLS)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise wrong_value(place, TOOLS, f"is not JSON: {error.msg}") from None
    further = row.get(TEMPLATE_ARGUMENTS) or {}
    if not isinstance(further, dict):
        raise wrong_value(place, TEMPLATE_ARGUMENTS, f"is {described(further)}, not an object")
    return {"tools": tools, **further} if tools else dict(further)
