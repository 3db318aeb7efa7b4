"""Token ids and labels of texts and conversations.

A label is its token's id, or -100 for a token without loss. The tokens and labels are those of TRL's SFTTrainer (the
tests compare them). But they are made before the model is loaded, and errors name the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.tasks.chat import apply_template
from loraplus_hydra.tasks.conversation import Conversation, Message, Text

IGNORED = -100
_NO_LIMIT = 1_000_000  # tokenizers without a limit give a far larger number


@dataclass(frozen=True)
class LossRule:
    """The choice of tokens that carry loss."""

    completion_only: bool  # no token of a prompt
    assistant_only: bool  # only tokens that the template marks as the assistant's
    template: str | None = None  # a chat template with such marks, in place of the tokenizer's


@dataclass(frozen=True)
class Encoded:
    """A row as the model takes it."""

    input_ids: list[int]
    labels: list[int]
    merged: bool = False  # the prompt's last tokens differ from those of the prompt alone


def longest_input(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of tokens that the model takes, or None if it is unknown."""
    limit: int = tokenizer.model_max_length
    return limit if limit < _NO_LIMIT else None


def encode_texts(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, rule: LossRule, end: str) -> list[Encoded]:
    """Encode plain texts, each followed by the token `end` unless it ends with it."""
    if not texts:
        return []
    full = [(text.prompt or "") + text.completion + _missing_end(text.completion, end) for text in texts]
    full_ids = tokenizer(full)["input_ids"]
    prompt_ids = tokenizer([text.prompt or "" for text in texts])["input_ids"]
    return [
        _encoded(ids, prompt if text.prompt is not None else None, rule)
        for text, ids, prompt in zip(texts, full_ids, prompt_ids, strict=True)
    ]


def _missing_end(completion: str, end: str) -> str:
    return "" if completion.endswith(end) else end


def encode_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, rule: LossRule, place: str
) -> Encoded:
    """Encode a conversation by the chat template.

    Raises ConfigErrors naming `place` if the template fails.
    """
    prompt_ids = None
    if conversation.prompt is not None:
        arguments = {"add_generation_prompt": True}
        prompt_ids, _ = _apply_template(conversation.prompt, conversation, tokenizer, rule, place, **arguments)
    messages = [*(conversation.prompt or []), *conversation.completion]
    ids, marks = _apply_template(messages, conversation, tokenizer, rule, place)
    if rule.assistant_only and not any(marks):
        raise _template_error(place, "the template marks no token as the assistant's", "leave the row out")
    return _encoded(ids, prompt_ids, rule, marks)


def _apply_template(
    messages: list[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    rule: LossRule,
    place: str,
    **arguments: Any,
) -> tuple[list[int], list[int]]:
    """Return token ids and marks.

    With `rule.assistant_only` a mark is 1 for the assistant's tokens, else 0; otherwise there are none.
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
        raise _template_error(place, str(error), "correct the row, or leave it out") from None
    return list(output["input_ids"]), list(output["assistant_masks"]) if masked else []


def _template_error(place: str, what: str, fix: str) -> ConfigErrors:
    return ConfigErrors([Problem("data", f"{place}: {what}", fix)])


def _encoded(
    ids: list[int], prompt_ids: list[int] | None, rule: LossRule, marks: Sequence[int] | None = None
) -> Encoded:
    # The completion begins at the first token that differs from the prompt alone: tokens can span both.
    start = 0 if prompt_ids is None else _common_length(prompt_ids, ids)
    first = start if rule.completion_only else 0
    labels = [
        token if position >= first and (not rule.assistant_only or not marks or marks[position]) else IGNORED
        for position, token in enumerate(ids)
    ]
    return Encoded(ids, labels, merged=prompt_ids is not None and start < len(prompt_ids))


def _common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens at their beginning two sequences have in common."""
    length = 0
    for token, other in zip(ids, others, strict=False):
        if token != other:
            break
        length += 1
    return length
