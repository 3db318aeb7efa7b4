"""Properties of the weights that training begins from, whatever the rows are."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 1_000_000  # tokenizers without a limit give a far larger number


@dataclass(frozen=True)
class Base:
    """The trained head and the positions of the base model.

    If a run or an adapter is loaded on it, they are that one's.
    """

    labels: tuple[str, ...] = ()  # names of a trained head's outputs, in their order; empty: no head, or no names
    head: str = "the model's trained head"  # the owner of the labels, for messages
    replaceable: bool = False  # the head can be replaced by a new one
    unnamed_outputs: int = 0  # outputs of a trained head whose labels have no names
    positions: int | None = None  # tokens that the model can take at most; None: no limit
    trained_positions: int | None = None  # tokens that a model without such a limit was made for; None: unknown


def longest_input(tokenizer: PreTrainedTokenizerBase, base: Base | None = None) -> int | None:
    """Return the number of tokens that the model takes, or None if it is unknown."""
    own: int | None = tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None
    return least(own, None if base is None else base.positions)


def max_length(task: DictConfig, tokenizer: PreTrainedTokenizerBase, base: Base | None) -> int | None:
    """Return the limit of tokens in a causal model's example.

    It is `task.args.max_length`, but no more than the model has positions for. Without a table of positions the model
    takes longer texts than it was made for, so that the tokenizer's limit doesn't count.
    """
    wanted: int | None = task.args.get("max_length")
    return wanted if base is None or base.positions is None else least(wanted, longest_input(tokenizer, base))


def least(*limits: int | None) -> int | None:
    """Return the least limit; None is no limit."""
    return min((limit for limit in limits if limit is not None), default=None)
