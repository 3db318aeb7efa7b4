"""Attention over joined rows: each row by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.training.lean.attention import (
    ROWS,
    UnknownBatchError,
    UnknownModelError,
    attend,
    attention_by_rows,
)
from loraplus_hydra.training.lean.rows import Rows
from tests.support.lean import LENGTHS, adapted


def rows_of(lengths: tuple[int, ...]) -> Rows:
    rows = Rows.of((torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long())
    assert rows is not None
    return rows


def heads(tokens: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, tokens, 6, dtype=torch.float64, generator=generator)


def by_hand(query: Any, key: Any, value: Any, *, causal: bool, scale: float) -> torch.Tensor:
    """Softmax attention of one row, [1, heads, tokens, size]."""
    scores = query @ key.transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ value


@given(lengths=LENGTHS, groups=st.sampled_from((1, 2, 4)), causal=st.booleans(), seed=st.integers(0, 99))
def test_each_row_attends_to_itself_alone(lengths: tuple[int, ...], groups: int, causal: bool, seed: int) -> None:
    rows = rows_of(lengths)
    query, key, value = (heads(rows.tokens, 4 // each, seed + index) for index, each in enumerate((1, groups, groups)))

    out, weights = attend(SimpleNamespace(is_causal=causal), query, key, value, None, scaling=0.3, **{ROWS: rows})

    assert weights is None
    start = 0
    for length in rows.lengths:
        q, k, v = (each[:, :, start : start + length] for each in (query, key, value))
        k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
        expected = by_hand(q, k, v, causal=causal, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(out[:, start : start + length], expected, rtol=1e-12, atol=1e-12)
        start += length


def test_a_nan_stays_in_its_row() -> None:
    rows = rows_of((3, 4))
    query, key, value = (heads(7, 2, seed) for seed in range(3))
    value[:, :, 5] = float("nan")

    out, _ = attend(SimpleNamespace(is_causal=False), query, key, value, None, **{ROWS: rows})

    assert out[:, :3].isfinite().all()
    assert out[:, 3:].isnan().all()


@pytest.mark.parametrize("strange", ["softcap", "s_aux", "position_bias"])
def test_a_layer_that_changes_its_scores_is_refused(strange: str) -> None:
    x = heads(3, 1, 0)

    with pytest.raises(UnknownModelError, match=strange):
        attend(SimpleNamespace(), x, x, x, None, **{ROWS: rows_of((3,)), strange: torch.ones(1)})


def test_a_layer_that_loses_the_rows_or_makes_its_own_mask_is_refused() -> None:
    x = heads(3, 1, 0)

    with pytest.raises(UnknownModelError):
        attend(SimpleNamespace(), x, x, x, None)
    with pytest.raises(UnknownModelError):
        attend(SimpleNamespace(), x, x, x, torch.ones(1, 1, 3, 3), **{ROWS: rows_of((3,))})


def test_a_row_beyond_the_window_is_for_the_model_s_own_attention() -> None:
    x = heads(5, 1, 0)
    rows = rows_of((2, 3))

    out, _ = attend(SimpleNamespace(), x, x, x, None, sliding_window=3, **{ROWS: rows})

    assert out.shape == (1, 5, 1, 6)
    with pytest.raises(UnknownBatchError, match="window of 2 tokens"):
        attend(SimpleNamespace(), x, x, x, None, sliding_window=2, **{ROWS: rows})


def test_the_model_s_own_attention_is_back_afterwards() -> None:
    config = adapted("llama").get_base_model().config
    before = config._attn_implementation

    def fail() -> None:
        with attention_by_rows(config):
            assert config._attn_implementation != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert config._attn_implementation == before
