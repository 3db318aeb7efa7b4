"""Token ids and labels of texts and conversations.

A token's label is its id, or -100 for a token without loss. The tokens and labels are equal to those of TRL's
SFTTrainer (tests compare them). But they are made before the model is loaded, and errors have the row's place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.tasks.chat import apply_template
from loraplus_hydra.tasks.conversation import Conversation, Text
from loraplus_hydra.tasks.messages import Message

IGNORED = -100
_READ = {"role", "content"}  # keys of messages that every template uses
_OTHER_TEXT = "\N{BLACK SQUARE}\N{WHITE SQUARE}"  # begins and ends with characters with which no answer begins or ends
# One of this number of last tokens with loss must end the answer; a template may add white space after the end
_END = 5


@dataclass(frozen=True)
class LossRule:
    """The rule that decides which tokens have loss."""

    completion_only: bool  # no token of a prompt has loss
    assistant_only: bool  # only tokens that the template marks as the assistant's have loss
    template: str | None = None  # a chat template with such marks, used instead of the tokenizer's


@dataclass(frozen=True)
class Encoded:
    """A row's tokens and labels, and properties for notes."""

    input_ids: list[int]
    labels: list[int]
    merged: bool = False  # the prompt's last tokens are different from the tokens of the prompt alone
    unasked: bool = False  # the text that the template adds to ask for an answer is not in the row
    changed: bool = False  # the template omits or changes a text that should have loss
    endless: bool = False  # no token that ends the last answer has loss
    unanswered: bool = False  # the last turn is not the assistant's
    unread: tuple[str, ...] = ()  # keys of messages, arguments and roles that the template doesn't use

    @property
    def length(self) -> int:
        return len(self.input_ids)


def encode(
    parts: Sequence[tuple[Text | Conversation, str]], tokenizer: PreTrainedTokenizerBase, rule: LossRule, end: str
) -> list[Encoded]:
    """Encode (text or conversation, place) pairs. Raises ConfigErrors."""
    # All texts are tokenised in one call, which is much faster.
    texts = [part for part, _ in parts if isinstance(part, Text)]
    encoded_texts = iter(encode_texts(texts, tokenizer, rule, end))
    return [
        encode_conversation(part, tokenizer, rule, place) if isinstance(part, Conversation) else next(encoded_texts)
        for part, place in parts
    ]


def encode_texts(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, rule: LossRule, end: str) -> list[Encoded]:
    """Encode plain texts. The token `end` is added to each text that doesn't end with it.

    It isn't added if the next row continues the text, because the model must not learn to stop in mid-document.
    """
    full = [
        (text.prompt or "") + (text.completion if text.continues else text.completion.removesuffix(end) + end)
        for text in texts
    ]
    full_ids = encode_plain(full, tokenizer)
    prompt_ids = encode_plain([text.prompt or "" for text in texts], tokenizer)
    return [
        _encoded(ids, prompt if text.prompt is not None else None, rule)
        for text, ids, prompt in zip(texts, full_ids, prompt_ids, strict=True)
    ]


def encode_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of texts that other text may follow.

    Special tokens that the tokenizer adds before a text are kept. Special tokens that it adds after a text are removed.
    A beginning that a text already has isn't doubled.
    """
    if not texts:
        return []
    # An end-of-text token that the tokenizer appends would end a prompt, and would be repeated at the end of a row.
    first, last = tokens_put_first(tokenizer), tokens_put_last(tokenizer)
    return [begun_once(ids[: len(ids) - last], first) for ids in tokenizer(list(texts))["input_ids"]]


def begun_once(ids: list[int], first: list[int]) -> list[int]:
    """Return the tokens of a text without a second beginning.

    `first` is what the tokenizer adds. Texts that were written with a template often have it, too.
    """
    return ids[1:] if first and ids[:2] == first * 2 else ids


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool) -> list[int]:
    """Return the tokens of a prompt, equal to the first tokens of its row.

    `special_tokens` is False for a template's text, which already has special tokens.
    """
    if special_tokens:
        return encode_plain([text], tokenizer)[0]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokens_put_first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-text token, if the tokenizer adds one before a text."""
    alone = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if alone and alone[0] == tokenizer.bos_token_id else []


def pad_as_class(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad on the side of the tokenizer's class, often the right.

    A tokenizer that was saved for generation pads on the left. Where positions are absolute, a classifier's scores
    would then depend on the other texts of the batch.
    """
    tokenizer.padding_side = type(tokenizer).padding_side


def tokens_put_last(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of special tokens that the tokenizer adds after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    start = next(starts, None)
    return 0 if start is None else len(whole) - start - len(bare)


def render(messages: list[Message], arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as text that ends where the model's answer begins. Raises UserError."""
    return str(apply_template(tokenizer, messages, add_generation_prompt=True, tokenize=False, **arguments))


def encode_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, rule: LossRule, place: str
) -> Encoded:
    """Encode a conversation with the chat template.

    Raises ConfigErrors, with `place`, if the template fails or no token has loss.
    """
    prompt_ids = None
    if conversation.prompt is not None:
        arguments = {"add_generation_prompt": True}
        prompt_ids, _ = _apply_template(conversation.prompt, conversation, tokenizer, rule, place, **arguments)
    turns = conversation.turns
    ids, marks = _apply_template(turns, conversation, tokenizer, rule, place)
    if rule.assistant_only and not any(marks):
        raise _template_error(place, "the template marks no token as the assistant's", "remove the row")
    encoded = _encoded(ids, prompt_ids, rule, marks)
    stops = _stops(tokenizer)
    for number in sorted(conversation.silent):
        other_ids, _ = _apply_template(_with_other_text(turns, number), conversation, tokenizer, rule, place)
        start = _common_length(ids, other_ids)
        end = len(ids) - _common_length(ids[start:][::-1], other_ids[start:][::-1])
        if start < end:  # otherwise the template omits this turn
            next_turn = _next_turn(number, end, ids, conversation, tokenizer, rule)
            _silence(encoded.labels, start, end, next_turn, ids, marks, stops)
    if all(label == IGNORED for label in encoded.labels):
        raise _template_error(place, "no message has loss, so there is nothing to learn", "remove the row")
    text = _text(turns, conversation, tokenizer, rule)
    answers = [turn.get("content") for number, turn in enumerate(turns) if _is_learnt(number, conversation)]
    learnt = [label for label in encoded.labels if label != IGNORED]
    return replace(
        encoded,
        merged=False,
        unasked=encoded.merged,
        changed=not all(_is_written(answer, text) for answer in answers),
        endless=turns[-1]["role"] == "assistant" and not stops & set(learnt[-_END:]),
        unanswered=turns[-1]["role"] != "assistant",
        unread=_unread(conversation, text, tokenizer, rule) + _dropped_roles(turns, text),
    )


def _is_written(content: Any, text: str) -> bool:
    return not isinstance(content, str) or content.strip() in text or json.dumps(content.strip())[1:-1] in text


def _dropped_roles(turns: list[Message], text: str) -> tuple[str, ...]:
    """Return the roles, except the assistant, of messages whose text the template omits."""
    roles = {
        turn["role"] for turn in turns if turn["role"] != "assistant" and not _is_written(turn.get("content"), text)
    }
    return tuple(f"messages of the role '{role}'" for role in sorted(roles))


def _is_learnt(number: int, conversation: Conversation) -> bool:
    learnt = number >= len(conversation.prompt or []) and number not in conversation.silent
    return learnt and conversation.turns[number]["role"] == "assistant"


def _stops(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that can end a turn: all special tokens."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def _with_other_text(turns: list[Message], number: int) -> list[Message]:
    return [*turns[:number], {"role": turns[number]["role"], "content": _OTHER_TEXT}, *turns[number + 1 :]]


def _next_turn(
    number: int,
    end: int,
    ids: list[int],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    rule: LossRule,
) -> int:
    """Return where the next turn or its text begins. The text of turn `number` is before `end`."""
    turns = conversation.turns
    if number + 1 == len(turns):
        return len(ids)
    # A template may write a last turn differently, or refuse a conversation that ends with this turn. Then the next
    # turn is found by its text. Its role also loses its loss then, but no answer does.
    for others in (turns[: number + 1], _with_other_text(turns, number + 1)):
        with suppress(ConfigErrors):
            other_ids, _ = _apply_template(others, conversation, tokenizer, rule, "")
            if (start := _common_length(ids, other_ids)) >= end:
                return start
    return end


def _silence(
    labels: list[int],
    start: int,
    end: int,
    next_turn: int,
    ids: list[int],
    marks: Sequence[int],
    stops: Collection[int],
) -> None:
    """Remove the loss of a turn, whose text is from `start` to `end`, and of its end.

    The end is a stop token, or all tokens before the next turn, because a template may end turns with plain text.
    """
    while marks and start > 0 and marks[start - 1] and ids[start - 1] not in stops:
        start -= 1
    while end < next_turn and ids[end - 1] not in stops and (not marks or marks[end]):
        end += 1
    labels[start:end] = [IGNORED] * (end - start)


def _text(turns: list[Message], conversation: Conversation, tokenizer: PreTrainedTokenizerBase, rule: LossRule) -> str:
    arguments = conversation.template_arguments
    return str(apply_template(tokenizer, turns, chat_template=rule.template, tokenize=False, **arguments))


def _unread(
    conversation: Conversation, text: str, tokenizer: PreTrainedTokenizerBase, rule: LossRule
) -> tuple[str, ...]:
    """Return the messages' keys and the arguments that the template doesn't use."""
    unread = []
    for key in sorted({key for turn in conversation.turns for key in turn} - _READ):
        turns = [{name: value for name, value in turn.items() if name != key} for turn in conversation.turns]
        if _same(text, turns, conversation, tokenizer, rule):
            unread.append(key)
    for key in conversation.template_arguments:
        others = {name: value for name, value in conversation.template_arguments.items() if name != key}
        without = replace(conversation, template_arguments=others)
        if _same(text, without.turns, without, tokenizer, rule):
            unread.append(key)
    return tuple(unread)


def _same(
    text: str, turns: list[Message], conversation: Conversation, tokenizer: PreTrainedTokenizerBase, rule: LossRule
) -> bool:
    try:
        return _text(turns, conversation, tokenizer, rule) == text
    except UserError:  # a template that fails without the key uses it
        return False


def _apply_template(
    messages: list[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    rule: LossRule,
    place: str,
    **arguments: Any,
) -> tuple[list[int], list[int]]:
    """Return token ids and marks.

    With `rule.assistant_only`, a mark is 1 for the assistant's tokens and 0 for others. Without it, there are no marks.
    """
    masked = rule.assistant_only and not arguments
    try:
        output = apply_template(
            tokenizer,
            messages,
            chat_template=rule.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=masked,
            **{**conversation.template_arguments, **arguments},
        )
    except UserError as error:
        raise _template_error(place, str(error), "correct or remove the row") from None
    return list(output["input_ids"]), list(output["assistant_masks"]) if masked else []


def _template_error(place: str, what: str, fix: str) -> ConfigErrors:
    return ConfigErrors([Problem("data", f"{place}: {what}", fix)])


def _encoded(
    ids: list[int], prompt_ids: list[int] | None, rule: LossRule, marks: Sequence[int] | None = None
) -> Encoded:
    # The completion begins at the first token that differs from the tokens of the prompt alone, because one token can
    # cover the end of the prompt and the beginning of the completion.
    start = 0 if prompt_ids is None else _common_length(prompt_ids, ids)
    first = start if rule.completion_only else 0
    labels = [
        token if position >= first and (not rule.assistant_only or not marks or marks[position]) else IGNORED
        for position, token in enumerate(ids)
    ]
    return Encoded(ids, labels, merged=prompt_ids is not None and start < len(prompt_ids))


def _common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the longest common beginning of two sequences."""
    length = 0
    for token, other in zip(ids, others, strict=False):
        if token != other:
            break
        length += 1
    return length
