"""Nearest rows of a matrix with F rows, without an F×F matrix.

A product in bf16 finds the few candidates for the nearest row, and these are compared in full precision: the result is
exact, at the cost of the cheap product.

R, C rows and columns of a tile · D width of the activations · F latents · M candidates per row · P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from c2r.kernels.above import Entries, entries_above
from c2r.kernels.rows import row_dots, row_starts
from c2r.machine import quick_dtype

TILE = 2048
_CROWDED = 64
"""If a tile has more candidates than this per row, its best ones are determined in full precision at once."""
_SLACK = {torch.bfloat16: 2.0**-6, torch.float32: 1e-5, torch.float64: 1e-12}
"""Twice the largest rounding error of the cosine of two unit rows; in bf16 that error is at most 2⁻⁸ + 2⁻⁹."""


class Nearest(NamedTuple):
    """The nearest other row of each of some rows."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple's method, not used)
    cosine: Tensor


def nearest_in_tiles(unit_FD: Tensor, dtype: torch.dtype | None = None) -> Nearest:
    """The exact nearest other row of every unit row by cosine; ties go to the lowest index.

    Only tiles of the upper triangle are computed; each is searched along its rows and along its columns. `dtype` is
    that of the products that select candidates; None: the fastest on this device.
    """
    low_FD = unit_FD.to(dtype or quick_dtype(unit_FD.device))
    contest = _Contest(unit_FD, _SLACK[low_FD.dtype])
    for top in range(0, len(unit_FD), TILE):
        for left in range(top, len(unit_FD), TILE):
            tile_RC = low_FD[top : top + TILE] @ low_FD[left : left + TILE].T
            if left == top:
                tile_RC.fill_diagonal_(-torch.inf)
            else:
                contest.offer(tile_RC, left, top, dim=0)
            contest.offer(tile_RC, top, left, dim=1)
    return contest.settle()


def nearest_of_slice(
    rows_FD: Tensor, inverse_F: Tensor, start: int, stop: int, dtype: torch.dtype, most: int
) -> tuple[Nearest, Tensor]:
    """The nearest other row of rows `start` to `stop`, and the indices of their `most` nearest rows `[R, most]`.

    Rows may have any norm; `inverse_F` are the inverse norms. The `most` nearest are found by a product in `dtype`, and
    the nearest of them in full precision. It is the true nearest unless more than `most` rows are equally near up to
    rounding.
    """
    low_FD = rows_FD.to(dtype)
    # A row's own norm does not affect which row is nearest to it; the other norms are divided out after the product.
    # On a CPU, multiplying all rows by a few is twice as fast as a few by all.
    tile_FR = (low_FD @ low_FD[start:stop].T).mul_(inverse_F.to(dtype)[:, None])
    tile_FR[start:stop].fill_diagonal_(-torch.inf)
    near_RM = tile_FR.T.contiguous().topk(min(most, len(rows_FD) - 1), dim=1).indices
    own_RM = torch.arange(start, stop, device=near_RM.device)[:, None].expand_as(near_RM)
    starts = torch.arange(0, near_RM.numel() + 1, near_RM.shape[1], device=near_RM.device)
    dots_RM = row_dots(rows_FD[start:stop], rows_FD, near_RM.flatten(), starts).view_as(near_RM)
    best = (dots_RM * inverse_F[own_RM] * inverse_F[near_RM]).max(1)
    return Nearest(near_RM.gather(1, best.indices[:, None])[:, 0], best.values.clamp(-1.0, 1.0)), near_RM


class _Contest:
    """Finds the nearest other row of each unit row from tiles of approximate cosines."""

    def __init__(self, unit_FD: Tensor, slack: float) -> None:
        self.unit_FD, self.slack = unit_FD, slack
        self.peak_F = unit_FD.new_full((len(unit_FD),), -torch.inf, dtype=torch.float32)
        self.entries: list[Entries] = []

    def offer(self, tile: Tensor, first_own: int, first_row: int, dim: int) -> None:
        """Collect candidates along `dim` of a tile: dim 1 finds neighbours of its rows, dim 0 those of its columns."""
        lines = slice(first_own, first_own + tile.shape[1 - dim])
        self.peak_F[lines] = torch.maximum(self.peak_F[lines], tile.amax(dim).float())
        found = entries_above(tile, self.peak_F[lines] - self.slack, dim)
        if len(found.values) > _CROWDED * tile.shape[1 - dim]:
            found = self._best_of(tile, lines, first_row, dim)
        line, other = (found.rows, found.columns) if dim == 1 else (found.columns, found.rows)
        self.entries.append(Entries(found.values, line + first_own, other + first_row))

    def _best_of(self, tile: Tensor, lines: slice, first_row: int, dim: int) -> Entries:
        """The nearest row of each line of the tile in full precision, for tiles with many nearly equal candidates."""
        rows = slice(first_row, first_row + tile.shape[dim])
        exact = self.unit_FD[lines] @ self.unit_FD[rows].T
        best = exact.masked_fill_((tile if dim == 1 else tile.T).isneginf(), -torch.inf).max(1)
        line = torch.arange(len(exact), device=exact.device)
        values = best.values + self.slack  # so that no later comparison with approximate peaks drops it
        return Entries(values, *((line, best.indices) if dim == 1 else (best.indices, line)))

    def settle(self) -> Nearest:
        """Compare the candidates within the slack of the best in full precision."""
        values, line, other = (torch.cat(parts) for parts in zip(*self.entries, strict=True))
        close_P = values >= self.peak_F[line] - self.slack
        line_P, order_P = line[close_P].sort()
        other_P = other[close_P][order_P]
        cosine_P = row_dots(self.unit_FD, self.unit_FD, other_P, row_starts(line_P, len(self.unit_FD)))
        cosine_F = torch.full_like(self.unit_FD[:, 0], -torch.inf).scatter_reduce(0, line_P, cosine_P, "amax")
        won_P = cosine_P == cosine_F[line_P]
        index_F = torch.full_like(line_P[:1], len(self.unit_FD)).expand(len(self.unit_FD)).clone()
        index_F.scatter_reduce_(0, line_P[won_P], other_P[won_P], "amin")
        return Nearest(index_F, cosine_F.clamp(-1.0, 1.0))
