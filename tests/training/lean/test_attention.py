"""Attention over joined rows: each row by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from loraplus_hydra.training.lean import attention
from loraplus_hydra.training.lean.attention import (
    NAME,
    UnknownBatchError,
    UnknownModelError,
    attend,
    attention_by_rows,
    rows_underway,
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


def attended(rows: Rows | None, *args: Any, **kwargs: Any) -> Any:
    """Return `attend`'s output while `rows` are under way."""
    if rows is None:
        return attend(*args, **kwargs)
    with attention_by_rows(PreTrainedConfig(), rows):
        return attend(*args, **kwargs)


def by_hand(query: Any, key: Any, value: Any, *, causal: bool, scale: float) -> torch.Tensor:
    """Softmax attention of one row, [1, heads, tokens, size]."""
    scores = query @ key.transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("on_a_grid", [False, True])  # the second is a GPU's way
@given(lengths=LENGTHS, groups=st.sampled_from((1, 2, 4)), causal=st.booleans(), seed=st.integers(0, 99))
def test_each_row_attends_to_itself_alone(
    on_a_grid: bool, lengths: tuple[int, ...], groups: int, causal: bool, seed: int
) -> None:
    rows = rows_of(lengths)
    query, key, value = (heads(rows.tokens, 4 // each, seed + index) for index, each in enumerate((1, groups, groups)))

    with mock.patch.object(attention, "_by_blocks", attention._on_a_grid if on_a_grid else attention._by_blocks):
        out, weights = attended(rows, SimpleNamespace(is_causal=causal), query, key, value, None, scaling=0.3)

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

    out, _ = attended(rows, SimpleNamespace(is_causal=False), query, key, value, None)

    assert out[:, :3].isfinite().all()
    assert out[:, 3:].isnan().all()


@pytest.mark.parametrize("strange", ["softcap", "s_aux", "position_bias", "indices"])
def test_a_layer_that_changes_its_scores_is_refused(strange: str) -> None:
    x = heads(3, 1, 0)

    with pytest.raises(UnknownModelError, match=strange):
        attended(rows_of((3,)), SimpleNamespace(), x, x, x, None, **{strange: torch.ones(1)})


def test_a_layer_that_has_other_tokens_or_makes_its_own_mask_is_refused() -> None:
    x = heads(3, 1, 0)

    with pytest.raises(UnknownModelError):
        attended(None, SimpleNamespace(), x, x, x, None)
    for tokens in ((2,), (4,)):
        with pytest.raises(UnknownModelError):
            attended(rows_of(tokens), SimpleNamespace(), x, x, x, None)
    with pytest.raises(UnknownModelError):
        attended(rows_of((3,)), SimpleNamespace(), x, x, x, torch.ones(1, 1, 3, 3))


def test_a_row_beyond_the_window_is_for_the_model_s_own_attention() -> None:
    x = heads(5, 1, 0)
    rows = rows_of((2, 3))

    out, _ = attended(rows, SimpleNamespace(), x, x, x, None, sliding_window=3)

    assert out.shape == (1, 5, 1, 6)
    with pytest.raises(UnknownBatchError, match="window of 2 tokens"):
        attended(rows, SimpleNamespace(), x, x, x, None, sliding_window=2)


def test_a_mask_that_does_more_than_separate_rows_is_refused() -> None:
    mask = ALL_MASK_ATTENTION_FUNCTIONS[NAME]

    with attention_by_rows(PreTrainedConfig(), rows_of((2, 3))):
        assert mask(batch_size=1, local_size=3) is None
        with pytest.raises(UnknownBatchError, match="window of 2 tokens"):
            mask(batch_size=1, local_size=2)
        with pytest.raises(UnknownModelError, match="its own mask"):
            mask(batch_size=1, use_vmap=True)


def test_the_model_s_own_attention_is_back_afterwards() -> None:
    config = adapted("llama").get_base_model().config
    before = config._attn_implementation

    def fail() -> None:
        with attention_by_rows(config, rows_of((3,))):
            assert rows_underway() is not None
            assert config._attn_implementation != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert config._attn_implementation == before
    assert rows_underway() is None
