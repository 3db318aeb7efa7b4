"""Attention over joined rows, each row by itself, for transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from loraplus_hydra.training.lean.rows import Rows

NAME = "loraplus_hydra_rows"  # as `attn_implementation`
_underway: ContextVar[Rows | None] = ContextVar("rows of the current lean forward", default=None)
# Keyword arguments of transformers' attention functions that do not change the scores. With any other argument that
# isn't None or False (a soft cap, sinks, a bias, chosen keys), the model runs plain.
_HARMLESS = frozenset(
    (
        *("is_causal", "sliding_window", "position_ids", "position_embeddings", "cache_position", "use_cache"),
        *("output_attentions", "output_hidden_states", "return_dict", "deterministic"),
    )
)


class UnknownModelError(Exception):
    """The lean forward can't compute this model, for any batch."""


class UnknownBatchError(Exception):
    """The lean forward can't compute this batch, but possibly other batches of the model."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of each row over itself.

    Inputs are [1, heads, tokens, size], and the output is [1, tokens, heads, size]. Raises UnknownModelError if the
    tokens are not the joined rows, or if the layer changes its scores in an unknown way. Raises UnknownBatchError if a
    row is longer than the layer's window.
    """
    rows = _underway.get()
    if rows is None or attention_mask is not None or query.shape[2] != rows.tokens or key.shape[2] != rows.tokens:
        raise UnknownModelError("its attention gets other tokens than those of a batch")
    for name, given in kwargs.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise UnknownModelError(f"its attention has the argument {name}")
    _refuse_longer_rows(rows, kwargs.get("sliding_window"))
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    tensors = (each[0].transpose(0, 1) for each in (query, key, value))
    attention = partial(functional.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    by_rows = _by_blocks if query.device.type == "cpu" else _on_a_grid
    return by_rows(rows, tensors, attention, causal)[None], None


def _by_blocks(rows: Rows, tensors: Iterable[torch.Tensor], attention: Callable[..., Any], causal: bool) -> Any:
    """Return [tokens, heads, size]: one call for each block of rows of equal length."""
    # Rows of equal length are adjacent, so a block is a view, and no token is copied or padded.
    sizes = [count * length for count, length in rows.blocks]
    made = []
    for (count, length), *block in zip(rows.blocks, *(each.split(sizes) for each in tensors), strict=True):
        out = attention(*(each.unflatten(0, (count, length)).transpose(1, 2) for each in block), is_causal=causal)
        made.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(made) if len(made) > 1 else made[0]


def _on_a_grid(rows: Rows, tensors: Iterable[torch.Tensor], attention: Callable[..., Any], causal: bool) -> Any:
    """Return [tokens, heads, size]: one call for all rows, with padding at their ends.

    A GPU computes the padding faster than it starts a kernel for each block.
    """
    grid = (each.transpose(1, 2) for each in map(rows.on_grid, tensors))
    # In causal attention no token sees the padding after it, and without a mask the fastest kernels can be used.
    mask = None if causal else rows.grid_mask[:, None, None, :]
    out = attention(*grid, is_causal=causal, attn_mask=mask)
    return rows.off_grid(out.transpose(1, 2))


def rows_underway() -> Rows | None:
    """Return the rows of the current lean forward; None outside of a lean forward."""
    return _underway.get()


def _no_mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> None:
    """Return None, because attention by rows needs no mask.

    Raises an error if a model's mask does more than separate rows.

    Some layers pass their window only to the mask, not to attention.
    """
    if use_vmap:
        raise UnknownModelError("its attention has its own mask")
    rows = _underway.get()
    if rows is not None:
        # Models without windows can make the mask of a window of 0, and give it to no layer
        _refuse_longer_rows(rows, local_size or None)


def _refuse_longer_rows(rows: Rows, window: int | None) -> None:
    if window is not None and max(rows.lengths) > window:
        raise UnknownBatchError(f"a row is longer than the attention's window of {window} tokens")


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def attention_by_rows(config: Any, rows: Rows) -> Iterator[None]:
    """Make models with `config` (a PreTrainedConfig) use `attend` on `rows` inside the block."""
    before = config._attn_implementation
    token = _underway.set(rows)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _underway.reset(token)
