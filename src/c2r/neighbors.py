"""Nearest decoder rows by cosine, for C²R's penalty and for the splitting evaluations.

Gradients are not recorded, and no F×F matrix is made. A latent is never its own neighbour, unless it has no other (it
is the only member of a chunk): then `index[i] == i` and `cosine[i] == 0`.

D width of the activations · F latents · M shortlisted candidates per latent · R rows that are searched.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from c2r.kernels.codes import at_least_fp32
from c2r.kernels.nearest import nearest_in_tiles, nearest_of_slice
from c2r.kernels.rows import row_dots

Mode = Literal["exact", "chunked"]
_STATE = ("index_F", "shortlist_MF", "cursor", "turn", "churn", "regret")
"""Mutable state of a `NeighborTable`, besides its generator."""


class Neighbors(NamedTuple):
    """The nearest neighbour of every latent."""

    index: Int[Tensor, " F"]  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple's method, not used)
    """j*(i), int64; ties go to the lowest index."""
    cosine: Float[Tensor, " F"]
    """cos(d_i, d_j*), in [−1, 1]; 0 for a zero row."""


@torch.no_grad()
def nearest_neighbors(
    decoder: Float[Tensor, "F D"],
    *,
    mode: Mode = "exact",
    chunk: int = 8192,
    generator: torch.Generator | None = None,
) -> Neighbors:
    """The nearest neighbour of each decoder row by cosine.

    Arguments:
        decoder: `[F, D]`, rows of any norm.
        mode: "exact" compares all pairs. "chunked" splits a random permutation into chunks and compares only within a
            chunk, as the published code does (arXiv 2606.30609): at F = 65,536 it misses 7 of 8 true neighbours.
        chunk: rows per chunk, for "chunked".
        generator: CPU generator of the permutation, for "chunked".

    Raises:
        ValueError: the decoder is not `[F, D]`, F < 2, a row is not finite, the mode is unknown, or chunk < 2.
    """
    check_decoder(decoder)
    check_rows(decoder)
    if mode not in ("exact", "chunked"):
        raise ValueError(f"mode: got {mode!r}; accepted are 'exact' and 'chunked'")
    if chunk < 2:
        raise ValueError(f"chunk: got {chunk}; accepted are whole numbers ≥ 2")
    with torch.autocast(decoder.device.type, enabled=False):  # near ties must not be decided in half precision
        return _nearest(unit_rows(decoder), mode, chunk, generator)


def _nearest(unit_FD: Tensor, mode: Mode, chunk: int, generator: torch.Generator | None) -> Neighbors:
    if mode == "exact":
        return Neighbors(*nearest_in_tiles(unit_FD))
    index_F = torch.arange(len(unit_FD), device=unit_FD.device)
    cosine_F = unit_FD.new_zeros(len(unit_FD))
    for members in torch.randperm(len(unit_FD), generator=generator).to(unit_FD.device).split(chunk):
        if len(members) > 1:
            found = nearest_in_tiles(unit_FD[members])
            index_F[members] = members[found.index]
            cosine_F[members] = found.cosine
    return Neighbors(index_F, cosine_F)


class NeighborTable:
    """Nearest neighbours that are kept up to date while a decoder is trained.

    "lagged", the default in training, is exact at first. Afterwards each call searches the neighbours of only `rows`
    rows, in turn, so that its cost is linear in F instead of quadratic. It also stores a shortlist of the `shortlist`
    nearest rows of each searched row, and each call compares every latent's neighbour with the next entry of its
    shortlist. This matters because C²R pushes neighbours apart, so that the nearest one changes often: without the
    shortlist, a third of the penalty still remained after 512 steps (docs/results/log.md). The cosine of an outdated
    neighbour is recomputed from the current decoder, and is at most that of the true neighbour. "exact" and "chunked"
    search all neighbours again in each call.

    Arguments:
        mode: "lagged", "exact" or "chunked".
        rows: number of rows that "lagged" searches per call; all rows are searched within F/rows calls.
        shortlist: M, number of candidates that "lagged" stores per row.
        chunk: rows per chunk of "chunked".
        dtype: dtype of the product with which "lagged" finds candidates; they are compared in fp32.
        seed: seed of the permutations of "chunked".
    """

    def __init__(
        self,
        mode: Literal["lagged", "exact", "chunked"] = "lagged",
        *,
        rows: int = 128,
        shortlist: int = 32,
        chunk: int = 8192,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.mode: Literal["lagged", "exact", "chunked"] = mode
        self.rows, self.shortlist, self.chunk, self.dtype = rows, shortlist, chunk, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.index_F: Tensor | None = None
        self.shortlist_MF: Tensor | None = None
        self.cursor = self.turn = 0
        self.churn = self.regret = torch.zeros(())
        """For the rows that "lagged" searched last: share of changed neighbours, and mean increase of their cosine."""

    @torch.no_grad()
    def refresh(self, decoder_FD: Tensor) -> Neighbors:
        """Update the table for the current decoder; return neighbours and their current cosines."""
        if self.mode != "lagged":
            return nearest_neighbors(decoder_FD, mode=self.mode, chunk=self.chunk, generator=self.generator)
        if self.index_F is None or self.shortlist_MF is None:
            found = nearest_neighbors(decoder_FD)
            self.index_F = found.index
            self.shortlist_MF = self.index_F.repeat(min(self.shortlist, len(decoder_FD) - 1), 1)
            return found
        rows_FD = at_least_fp32(decoder_FD)
        inverse_F = inverse_norms(rows_FD)
        # A new tensor, because the previous one may still be part of an autograd graph.
        self.index_F = self.index_F.clone()
        with torch.autocast(decoder_FD.device.type, enabled=False):
            self._renew(rows_FD, inverse_F, self.index_F, self.shortlist_MF)
        return Neighbors(self.index_F, self._look_at_one_more(rows_FD, inverse_F, self.index_F, self.shortlist_MF))

    def _renew(self, rows_FD: Tensor, inverse_F: Tensor, index_F: Tensor, shortlist_MF: Tensor) -> None:
        """Search neighbours and shortlists of the next rows."""
        rows = slice(self.cursor, min(self.cursor + self.rows, len(rows_FD)))
        found, near_RM = nearest_of_slice(rows_FD, inverse_F, rows.start, rows.stop, self.dtype, self.shortlist)
        stale_RD, rows_RD = unit_rows(rows_FD[index_F[rows]]), unit_rows(rows_FD[rows])
        self.churn = (found.index != index_F[rows]).float().mean()
        self.regret = (found.cosine - (rows_RD * stale_RD).sum(1)).clamp(min=0).mean()
        index_F[rows], shortlist_MF[:, rows] = found.index, near_RM.T
        self.cursor = rows.stop % len(rows_FD)

    def _look_at_one_more(self, rows_FD: Tensor, inverse_F: Tensor, index_F: Tensor, shortlist_MF: Tensor) -> Tensor:
        """Swap every latent's neighbour with the next entry of its shortlist if that one is nearer.

        Returns the cosines of the resulting neighbours.
        """
        other_F = shortlist_MF[self.turn]
        two_2F = torch.stack([index_F, other_F], 1).flatten()
        starts = torch.arange(0, len(two_2F) + 1, 2, device=two_2F.device)
        dots_2F = row_dots(rows_FD, rows_FD, two_2F, starts) * inverse_F[two_2F]
        now_F, then_F = dots_2F.view(-1, 2).unbind(1)
        nearer_F = then_F > now_F
        winner_F, loser_F = torch.where(nearer_F, other_F, index_F), torch.where(nearer_F, index_F, other_F)
        index_F.copy_(winner_F)
        shortlist_MF[self.turn] = loser_F
        self.turn = (self.turn + 1) % len(shortlist_MF)
        return (torch.maximum(now_F, then_F) * inverse_F).clamp(-1.0, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue as if it had not been interrupted."""
        return {"generator": self.generator.get_state(), **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.generator.set_state(state["generator"])
        for name in _STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)


def renewed_rows(width: int, steps: int) -> int:
    """Rows that the lagged table searches per step: at least 32, and enough to search each row once per 512 steps and
    20 times per run; at most 1024.
    """
    return min(max(32, -(-width // 512), -(-20 * width // steps)), 1024, width)


def random_floor(width: int, d_in: int) -> float:
    """Approximate nearest-neighbour cosine of `width` random directions in `d_in` dimensions: √(2 ln F / D), at most 1.

    The approximation holds for large D; at D ≤ 2 ln F it is 1 and meaningless.
    """
    return min(1.0, math.sqrt(2 * math.log(width) / d_in))


def check_decoder(decoder: Tensor) -> None:
    """Raise ValueError unless `decoder` is a floating-point `[F, D]` with F ≥ 2."""
    if decoder.ndim != 2 or not decoder.is_floating_point():
        raise ValueError(
            f"decoder: got {decoder.dtype} {list(decoder.shape)}; expected floating-point [F, D], one row per latent"
        )
    if decoder.shape[0] < 2:
        raise ValueError(f"decoder: got {list(decoder.shape)}; expected [F, D] with F ≥ 2 latents to compare")


def check_rows(decoder: Tensor) -> None:
    """Raise ValueError, naming the first such row, if rows contain NaN, infinity, or entries whose squares overflow."""
    broken_F = ~at_least_fp32(decoder.detach()).norm(dim=1).isfinite()
    if broken_F.any():
        rows = broken_F.nonzero().squeeze(1).tolist()
        raise ValueError(
            f"decoder: row {rows[0]} has no finite norm, because it contains NaN, infinity or too large entries "
            f"({len(rows)} of {len(broken_F)} rows do)"
        )


def inverse_norms(rows_FD: Tensor) -> Tensor:
    """1/‖d_i‖ `[F]`; for a zero row a large finite number, so that products with the row stay 0."""
    return rows_FD.norm(dim=1).clamp(min=1e-12).reciprocal()


def unit_rows(decoder_FD: Tensor) -> Tensor:
    """Rows of norm 1 in at least fp32; a zero row stays zero."""
    return F.normalize(at_least_fp32(decoder_FD), dim=1)
