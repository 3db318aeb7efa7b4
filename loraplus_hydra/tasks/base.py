"""Properties of the weights that training begins from."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 1_000_000  # tokenizers without a limit have a far larger number


@dataclass(frozen=True)
class Base:
    """The trained head and the positions of the base model.

    If an adapter or a run is loaded, the properties are those of the adapter or run.
    """

    labels: tuple[str, ...] = ()  # names of a trained head's outputs in order; empty without a head or names
    head: str = "the model's trained head"  # the owner of the labels, as named in messages
    replaceable: bool = False  # True if a new head can replace the trained head
    unnamed_outputs: int = 0  # number of outputs of a trained head without names
    positions: int | None = None  # maximum number of tokens in the model's input; None: no limit
    # Number of tokens for which a model without such a limit was trained; None: unknown
    trained_positions: int | None = None


def longest_input(tokenizer: PreTrainedTokenizerBase, base: Base | None = None) -> int | None:
    """Return the maximum number of tokens in the model's input, or None if unknown."""
    own: int | None = tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None
    return least(own, None if base is None else base.positions)


def max_length(task: DictConfig, tokenizer: PreTrainedTokenizerBase, base: Base | None) -> int | None:
    """Return the maximum number of tokens in a causal model's example.

    This is the smallest of `task.args.max_length`, the model's number of positions and the tokenizer's limit. A model
    without learned position embeddings (for example, with RoPE) has no number of positions. Then only
    `task.args.max_length` counts.
    """
    wanted: int | None = task.args.get("max_length")
    return wanted if base is None or base.positions is None else least(wanted, longest_input(tokenizer, base))


def least(*limits: int | None) -> int | None:
    """Return the smallest limit. None means no limit."""
    return min((limit for limit in limits if limit is not None), default=None)
