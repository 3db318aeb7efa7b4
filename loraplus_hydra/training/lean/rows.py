"""Rows of a padded batch, joined into one row of tokens without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch


@dataclass(frozen=True, eq=False)
class Rows:
    """The places of a padded batch's tokens in the joined row.

    Rows are joined in the order of their lengths, because rows of equal length form one block in attention. `kept` has
    the tokens' places in the flattened batch. It is None if the batch has no padding; the batch is then its own joined
    row.
    """

    shape: tuple[int, int]  # number of rows and columns of the batch
    lengths: tuple[int, ...]  # number of tokens of each row, in joined order
    kept: torch.Tensor | None
    device: torch.device

    @classmethod
    def of(cls, mask: torch.Tensor) -> Rows | None:
        """Return the rows of an attention mask of zeros and ones, [rows, columns]; None if a row has no token."""
        rows, columns = mask.shape
        lengths = mask.sum(1).tolist()
        if min(lengths) == columns:
            return cls((rows, columns), (columns,) * rows, None, mask.device)
        if min(lengths) == 0:
            return None
        order = sorted(range(rows), key=lengths.__getitem__)
        # Padding may be at the end, at the beginning, or between tokens.
        places = torch.arange(rows * columns, device=mask.device).view(rows, columns)
        index = torch.tensor(order, device=mask.device)
        kept = places[index][mask[index].bool()]
        return cls((rows, columns), tuple(lengths[row] for row in order), kept, mask.device)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(number of rows, length) for each block of rows of equal length."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @property
    def tokens(self) -> int:
        """The number of tokens in the joined row."""
        return sum(self.lengths)

    @cached_property
    def grid_mask(self) -> torch.Tensor:
        """The places of the grid that have a token, as a mask, [rows, longest row]."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(max(self.lengths), device=self.device) < lengths[:, None]

    @cached_property
    def _on_grid(self) -> torch.Tensor:
        return self.grid_mask.flatten().nonzero()[:, 0]

    def on_grid(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [rows, longest row, ...] from the joined row's [tokens, ...], with zeros after each row."""
        grid = tokens.new_zeros(self.grid_mask.numel(), *tokens.shape[1:])
        return grid.index_copy(0, self._on_grid, tokens).view(*self.grid_mask.shape, *tokens.shape[1:])

    def off_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """Return the joined row's [tokens, ...] from [rows, longest row, ...]."""
        return grid.flatten(0, 1)[self._on_grid]

    def join(self, padded: torch.Tensor) -> torch.Tensor:
        """Return [1, tokens, ...] from the batch's [rows, columns, ...]."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return (flat if self.kept is None else flat[self.kept])[None]

    def pad(self, joined: torch.Tensor) -> torch.Tensor:
        """Return the batch's [rows, columns, ...] from [1, tokens, ...], with zeros for padding."""
        flat = joined[0]
        if self.kept is not None:
            empty = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
            flat = empty.index_copy(0, self.kept, flat)
        return flat.view(*self.shape, *flat.shape[1:])

    def places(self, chosen: torch.Tensor) -> torch.Tensor | None:
        """Return the places in the joined row of the chosen places of the batch, in the batch's order.

        `chosen` is a mask, [rows, columns]. Returns None if a chosen place is padding.
        """
        flat = chosen.reshape(-1).nonzero()[:, 0]
        if self.kept is None:
            return flat
        places = torch.full((self.shape[0] * self.shape[1],), -1, device=chosen.device)
        places[self.kept] = torch.arange(len(self.kept), device=chosen.device)
        found = places[flat]
        return None if bool((found < 0).any()) else found


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each place of a batch, by transformers' default: its column."""
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
