"""Messages in rows, converted from all usual forms to the form of chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplus_hydra.errors import first_line, nearest
from loraplus_hydra.tasks.rows import describe, row_error

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_CALL = "function_call"  # a role of ShareGPT; its text is one tool call or a list of tool calls
_OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    _CALL: "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = (_CALL, "tool_call")
# Keys that exclude a message from the loss: OpenAI's and Mistral's `weight`, axolotl's `train`, and others.
WEIGHTS = ("weight", "loss_weight", "train", "loss")


@dataclass(frozen=True)
class Messages:
    """A list of messages, and the numbers of the messages without loss."""

    turns: list[Message]
    silent: frozenset[int] = frozenset()


def holds_messages(value: Any) -> bool:
    """Return True for a list, an object, and text that is a JSON list of messages.

    At least one message must have a known role. Other lists, such as `[{"from": "Rome", "to": "Paris"}]`, are text to
    learn.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return isinstance(value, (list, dict))
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return False
    if not all(isinstance(each, dict) and {"role", "from"} & each.keys() for each in read):
        return False
    return any(str(each.get("role", each.get("from"))) in (*ROLES, *_OTHER_NAMES) for each in read)


def read_messages(value: Any, column: str, place: str) -> Messages:
    """Return a row's messages. Each has a known role and text as content.

    Text is read as JSON, because a CSV has only text. One message is read as a list with this message. Raises
    ConfigErrors.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = json_value(value, column, place)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise row_error(place, column, f"is {describe(value)}, not a list of messages")
    if not value:
        raise row_error(place, column, "is an empty list, so there is nothing to learn")
    turns, silent = [], set()
    for number, message in enumerate(value):
        where = f"{place}, message {number + 1}"
        turn = _message(message, column, where)
        weights = [_weight(turn.pop(key), key, column, where) for key in WEIGHTS if key in turn]
        if not all(weights):
            silent.add(number)
        turns.append(turn)
    return Messages(turns, frozenset(silent))


def with_system(messages: Messages, system: Any, column: str, place: str) -> Messages:
    """Return the messages, with a system message first if the row's column has text."""
    if not system:
        return messages
    if not isinstance(system, str):
        raise row_error(place, column, f"is {describe(system)}, not text")
    if messages.turns and messages.turns[0]["role"] == "system":
        if messages.turns[0].get("content") == system:
            return messages
        raise row_error(place, column, "is a system message, but the messages begin with a different system message")
    turns = [{"role": "system", "content": system}, *messages.turns]
    return Messages(turns, frozenset(number + 1 for number in messages.silent))


def question(turns: list[Message]) -> list[Message]:
    """Return the turns before the assistant's last answer, if the conversation ends with an answer."""
    asked = list(turns)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    return asked


def json_value(value: Any, column: str, place: str) -> Any:
    """Return a value. Text is parsed as JSON. Raises ConfigErrors."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise row_error(place, column, f"is not JSON: {getattr(error, 'msg', first_line(error))}") from None


def _message(message: Any, column: str, place: str) -> Message:
    if not isinstance(message, dict):
        raise row_error(place, column, f"has {describe(message)}, but a message must be {{role: ..., content: ...}}")
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    role = message.get("role")
    if role in _CALLS:
        message |= {"content": "", "tool_calls": _called(message.get("content"), column, place)}
    message["role"] = role = _OTHER_NAMES.get(str(role), role)
    if role is None:
        raise row_error(place, column, "has a message without a role", f"use one of {', '.join(ROLES)}")
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise row_error(place, column, f"has a message with the role '{role}'{hint}", f"use one of {', '.join(ROLES)}")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], column, place)
    if _CALL in message:  # OpenAI's old key, before `tool_calls`
        message["tool_calls"] = [message.pop(_CALL)]
    if "tool_calls" in message and not message["tool_calls"]:
        del message["tool_calls"]
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            raise row_error(place, column, f"has {describe(message['tool_calls'])}, but needs a list of tool calls")
        message["tool_calls"] = [_tool_call(call, column, place) for call in message["tool_calls"]]
    _check_content(message, column, place)
    return message


def _check_content(message: Message, column: str, place: str) -> None:
    content, calls_tools = message.get("content"), bool(message.get("tool_calls"))
    if content is None and not calls_tools:
        raise row_error(place, column, "has a message without content")
    if content is not None and not isinstance(content, str):
        raise row_error(place, column, f"has a message whose content is {describe(content)}, not text")
    if message["role"] == "assistant" and not content and not calls_tools:
        raise row_error(place, column, "has an empty message of the assistant, so there is nothing to learn")


def _joined(parts: list[Any], column: str, place: str) -> str:
    """Return the text of a message's content, given as a list of parts.

    Raises ConfigErrors for a part that is not text.
    """
    texts = []
    for part in parts:
        text = part
        if isinstance(part, Mapping):
            text = next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            what = f"has a part of the type '{kind}'" if kind else f"has {describe(part)} among the parts"
            raise row_error(place, column, f"{what} of a message, but only text can be learnt")
        texts.append(text)
    return "".join(texts)


def _called(value: Any, column: str, place: str) -> list[Any]:
    calls = json_value(value, column, place)
    return calls if isinstance(calls, list) else [calls]


def _tool_call(call: Any, column: str, place: str) -> Any:
    """Return a tool call in the form of templates.

    The form is {type, function: {name, arguments}}, with the arguments as an object.
    """
    if not isinstance(call, dict):
        raise row_error(place, column, f"has {describe(call)}, but a tool call must be {{name: ..., arguments: ...}}")
    function = call.get("function", {key: call[key] for key in ("name", "arguments") if key in call})
    if isinstance(function, dict):
        # A call without arguments is written in several ways: with an empty text, with null, and without the key.
        arguments = json_value(function.get("arguments") or "{}", column, place)
        function = {**function, "arguments": {} if arguments is None else arguments}
    others = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    return {"type": "function", **others, "function": function}


def _weight(value: Any, key: str, column: str, place: str) -> bool:
    """Return False for a message without loss."""
    if value not in (0, 1):
        raise row_error(place, column, f"has a message with {key} {describe(value)}", "use 0 (no loss) or 1")
    return bool(value)
