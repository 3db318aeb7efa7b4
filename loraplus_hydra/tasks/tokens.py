"""Texts and conversations -> token ids and labels. A label of -100 carries no loss; any other is its token's id.

The same tokens and labels as TRL's SFTTrainer makes (the tests compare them), but known before the model is loaded,
with the place of each row that can't be made sense of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplus_hydra.errors import ConfigErrors, Problem, first_line
from loraplus_hydra.tasks.conversation import Conversation, Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class LossRule:
    """Which tokens carry loss."""

    completion_only: bool  # none of a prompt's
    assistant_only: bool  # only those that the template marks as the assistant's
    template: str | None = None  # a chat template to use in place of the tokenizer's, for its marks


@dataclass(frozen=True)
class Encoded:
    """A row as the model takes it."""

    input_ids: list[int]
    labels: list[int]
    merged: bool = False  # the prompt's last tokens aren't those that it has alone


def encode_texts(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, rule: LossRule, end: str) -> list[Encoded]:
    """Plain texts, each followed by the token `end` unless it ends so already."""
    if not texts:
        return []
    whole = [_ended((text.prompt or "") + text.completion, text.completion, end) for text in texts]
    whole_ids = tokenizer(whole)["input_ids"]
    prompt_ids = tokenizer([text.prompt or "" for text in texts])["input_ids"]
    return [
        _encoded(ids, prompt if text.prompt is not None else None, rule)
        for text, ids, prompt in zip(texts, whole_ids, prompt_ids, strict=True)
    ]


def _ended(text: str, completion: str, end: str) -> str:
    return text if completion.endswith(end) else text + end


def encode_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, rule: LossRule, place: str
) -> Encoded:
    """A conversation as the chat template writes it; raises ConfigErrors naming `place` when the template can't."""
    prompt_ids = None
    if conversation.prompt is not None:
        prompt_ids = _templated(conversation.prompt, conversation, tokenizer, rule, place, add_generation_prompt=True)[
            0
        ]
    messages = [*(conversation.prompt or []), *conversation.completion]
    ids, marks = _templated(messages, conversation, tokenizer, rule, place)
    if rule.assistant_only and not any(marks):
        raise _template_error(place, "the template marks no token as the assistant's", "leave the row out")
    return _encoded(ids, prompt_ids, rule, marks)


def _templated(
    messages: list[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    rule: LossRule,
    place: str,
    **arguments: Any,
) -> tuple[list[int], list[int]]:
    """Token ids, and with `rule.assistant_only` a 1 for each token of the assistant's."""
    masked = rule.assistant_only and not arguments
    try:
        output = tokenizer.apply_chat_template(
            messages,
            chat_template=rule.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=masked,
            **{**conversation.template_arguments, **arguments},
        )
    except Exception as error:  # a template can raise anything: its own errors, Jinja's, those of Python inside it
        reason = first_line(error)
        raise _template_error(place, f"the chat template fails: {reason}", "mend the row, or leave it out") from None
    return list(output["input_ids"]), list(output["assistant_masks"]) if masked else []


def _template_error(place: str, what: str, fix: str) -> ConfigErrors:
    return ConfigErrors([Problem("data", f"{place}: {what}", fix)])


def _encoded(
    ids: list[int], prompt_ids: list[int] | None, rule: LossRule, marks: Sequence[int] | None = None
) -> Encoded:
    """Labels by the rule. The completion begins where the whole differs from the prompt alone."""
    start = 0 if prompt_ids is None else _common_length(prompt_ids, ids)
    first = start if rule.completion_only else 0
    labels = [
        token if position >= first and (not rule.assistant_only or not marks or marks[position]) else IGNORED
        for position, token in enumerate(ids)
    ]
    return Encoded(ids, labels, merged=prompt_ids is not None and start < len(prompt_ids))


def _common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = 0
    for token, other in zip(ids, others, strict=False):
        if token != other:
            break
        length += 1
    return length
