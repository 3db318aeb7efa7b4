"""Attention over joined rows, each row by itself, as transformers' attention interface calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from loraplus_hydra.training.lean.rows import Rows

NAME = "loraplus_hydra_rows"  # as `attn_implementation`
ROWS = "loraplus_hydra_rows"  # the keyword argument that reaches attention through the model's layers
# Keyword arguments of transformers' attention functions that change the scores, and that this one does not know.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "alibi", "head_mask")


class UnknownModelError(Exception):
    """The lean forward does not know something that this model does: it is for no batch of it."""


class UnknownBatchError(Exception):
    """The lean forward does not know something that this batch needs; others it may do."""


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

    Inputs are [1, heads, tokens, size], the output is [1, tokens, heads, size]. Raises UnknownModelError where rows are
    missing or the layer changes its scores in a way not known here, and UnknownBatchError where a row is longer than
    the layer's window.
    """
    rows: Rows | None = kwargs.get(ROWS)
    if rows is None or attention_mask is not None or query.shape[2] != rows.tokens:
        raise UnknownModelError("its attention does not hand over the rows of a batch")
    if strange := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise UnknownModelError(f"its attention takes {strange[0]}")
    window = kwargs.get("sliding_window")
    if window is not None and max(rows.lengths) > window:
        raise UnknownBatchError(f"a row is longer than the attention's window of {window} tokens")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    sizes = [count * length for count, length in rows.blocks]
    # Rows of one length stand side by side, so that a block is a view and no token is copied or padded.
    parts = zip(rows.blocks, *(each[0].transpose(0, 1).split(sizes) for each in (query, key, value)), strict=True)
    made = []
    for (count, length), *block in parts:
        q, k, v = (each.unflatten(0, (count, length)).transpose(1, 2) for each in block)
        out = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scaling)
        made.append(out.transpose(1, 2).flatten(0, 1))
    return (torch.cat(made) if len(made) > 1 else made[0])[None], None


# Without an entry among transformers' mask functions no mask is made for an implementation of one's own.
AttentionInterface.register(NAME, attend)


@contextmanager
def attention_by_rows(config: Any) -> Iterator[None]:
    """Inside, the models of `config` (a PreTrainedConfig) attend by `attend`; outside as before."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
