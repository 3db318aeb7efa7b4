"""Rows of a padded batch, joined without padding and padded again."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.training.lean.rows import Rows, positions

MASKS = st.integers(1, 6).flatmap(
    lambda columns: st.lists(
        st.lists(st.integers(0, 1), min_size=columns, max_size=columns).filter(any), min_size=1, max_size=6
    )
)


def of(mask: list[list[int]]) -> Rows:
    rows = Rows.of(torch.tensor(mask))
    assert rows is not None
    return rows


@given(mask=MASKS)
def test_joined_rows_hold_every_token_once_and_pad_to_the_batch_again(mask: list[list[int]]) -> None:
    rows, at = of(mask), torch.tensor(mask).bool()
    values = torch.arange(1, at.numel() + 1).view(at.shape)

    joined = rows.join(values)

    assert joined.shape == (1, rows.tokens)
    assert sorted(joined[0].tolist()) == sorted(values[at].tolist())
    assert torch.equal(rows.pad(joined), values * at)


@given(mask=MASKS)
def test_a_row_s_tokens_stay_together_and_in_order(mask: list[list[int]]) -> None:
    rows = of(mask)
    columns = torch.arange(len(mask[0])).expand(len(mask), -1)
    row_of = torch.arange(len(mask))[:, None].expand(len(mask), len(mask[0]))

    parts = rows.join(torch.stack([row_of, columns], -1))[0].split(list(rows.lengths))

    assert len({int(part[0, 0]) for part in parts}) == len(mask)
    for part in parts:
        assert len(set(part[:, 0].tolist())) == 1
        assert part[:, 1].tolist() == sorted(part[:, 1].tolist())


@given(mask=MASKS)
def test_blocks_are_runs_of_rows_of_one_length(mask: list[list[int]]) -> None:
    rows = of(mask)

    assert [length for count, length in rows.blocks for _ in range(count)] == list(rows.lengths)
    assert len({length for _, length in rows.blocks}) == len(rows.blocks)


@given(mask=MASKS, data=st.data())
def test_places_point_at_the_chosen_tokens_in_the_batch_s_order(mask: list[list[int]], data: st.DataObject) -> None:
    rows, at = of(mask), torch.tensor(mask).bool()
    flags = data.draw(st.lists(st.booleans(), min_size=at.numel(), max_size=at.numel()))
    chosen = torch.tensor(flags).view(at.shape)
    values = torch.arange(at.numel()).view(at.shape)

    places = rows.places(chosen)

    if bool((chosen & ~at).any()):
        assert places is None
    else:
        assert places is not None
        assert torch.equal(rows.join(values)[0][places], values[chosen])


def test_a_full_batch_is_joined_without_a_copy() -> None:
    values = torch.zeros(3, 4, 2)
    rows = of([[1] * 4] * 3)

    assert rows.join(values).data_ptr() == values.data_ptr()
    assert rows.blocks == [(3, 4)]


def test_a_row_without_tokens_is_refused() -> None:
    assert Rows.of(torch.tensor([[1, 1], [0, 0]])) is None


def test_positions_are_columns_as_transformers_counts_them() -> None:
    assert positions(torch.tensor([[0, 1, 1]])).tolist() == [[0, 1, 2]]
