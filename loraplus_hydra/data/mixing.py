"""Several data sets -> one: which rows are held out, which are drawn, and in what shares they are mixed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraplus_hydra.data.rows import CONTINUES

if TYPE_CHECKING:
    from datasets import Dataset


def hold_out(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(`rows` without those held out, those held out), at least one each; `rows` has two or more.

    They are drawn by `seed`; of documents that go over several rows it is the end.
    """
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    if CONTINUES in rows.column_names:
        return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [index for index in range(len(rows)) if index not in held_out]
    return rows.select(kept), rows.select(sorted(held_out))


def draw(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """`count` of the rows in their order, drawn by `seed`; all of them when there are no more than that.

    Of documents that go over several rows it is the beginning.
    """
    if count is None or count >= len(rows):
        return rows
    if CONTINUES in rows.column_names:
        return rows.select(range(count))
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))


def mix(parts: Sequence[Dataset], weights: Sequence[float] | None, seed: int) -> Dataset:
    """The parts as one: whole, or with `weights` in these shares.

    With weights no row comes twice: as many rows are drawn as the shares allow, so at least one part is used whole. A
    column that only some parts have is null in the rows of the others.
    """
    from datasets import concatenate_datasets

    if weights is not None:
        counts = shares([len(part) for part in parts], weights)
        parts = [draw(part, count, seed) for part, count in zip(parts, counts, strict=True)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(list(parts))


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows to take of parts with these sizes so that they stand in the ratio of the weights; one at least."""
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, max(1, round(total * weight))) for size, weight in zip(sizes, weights, strict=True)]
