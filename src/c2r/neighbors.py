"""Nearest decoder rows by cosine: the search behind C²R's penalty and behind the splitting evaluations.

Nothing here records gradients or holds an F×F matrix. A latent is never its own neighbour, except where it has
none (the only member of a chunk): then `index[i] == i` and `cosine[i] == 0`.

D width of the activations · F latents.
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
"""What changes in a `NeighborTable`, besides its generator."""


class Neighbors(NamedTuple):
    """The nearest neighbour of every latent."""

    index: Int[Tensor, " F"]  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple's method, not used)
    """j*(i), int64; the lowest index among equals."""
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
        mode: "exact" compares every pair. "chunked" cuts a random permutation into chunks and looks inside each
            alone, as published (arXiv 2606.30609's code): at F = 65,536 it misses the true neighbour 7 times in 8.
        chunk: rows a chunk, for "chunked".
        generator: source of the permutation (CPU), for "chunked".

    Raises:
        ValueError: not `[F, D]`, F < 2, a row that is not finite, an unknown mode, chunk < 2.
    """
    check_decoder(decoder)
    check_rows(decoder)
    if mode not in ("exact", "chunked"):
        raise ValueError(f"mode: got {mode!r}; accepted are 'exact' and 'chunked'")
    if chunk < 2:
        raise ValueError(f"chunk: got {chunk}; accepted are whole numbers ≥ 2")
    with torch.autocast(decoder.device.type, enabled=False):  # a caller's would decide near ties in half precision
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
    """Nearest neighbours kept up to date while a decoder is trained.

    "lagged" (the default of training) is exact when made. Afterwards it renews `rows` of its rows a call, in turn, so
    that its cost grows as F and not as F²; a renewed row also keeps a shortlist of its `shortlist` nearest, and every
    call compares each latent's neighbour with the next of its shortlist. C²R turns neighbours away from each other, so
    that the nearest changes often; without the shortlist a third of the penalty was left after 512 steps
    (docs/results/log.md).
    The cosine of a stale neighbour is recomputed from the current decoder, and is never more than the true
    neighbour's. "exact" and "chunked" search anew at every call.

    Arguments:
        mode: "lagged", "exact" or "chunked".
        rows: how many rows "lagged" renews a call; all of them within F/rows calls.
        shortlist: M, candidates that "lagged" keeps of each row.
        chunk: rows a chunk of "chunked".
        dtype: of the product with which "lagged" finds candidates; they are compared in fp32.
        seed: of the permutations of "chunked".
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
        """Of the rows "lagged" renewed last: the share whose neighbour changed, and the mean cosine gained by it."""

    @torch.no_grad()
    def refresh(self, decoder_FD: Tensor) -> Neighbors:
        """Neighbours for the decoder as it is now, with their cosines in it."""
        if self.mode != "lagged":
            return nearest_neighbors(decoder_FD, mode=self.mode, chunk=self.chunk, generator=self.generator)
        if self.index_F is None or self.shortlist_MF is None:
            found = nearest_neighbors(decoder_FD)
            self.index_F = found.index
            self.shortlist_MF = self.index_F.repeat(min(self.shortlist, len(decoder_FD) - 1), 1)
            return found
        rows_FD = at_least_fp32(decoder_FD)
        inverse_F = inverse_norms(rows_FD)
        # A new tensor each time: the last one may still be part of an autograd graph.
        self.index_F = self.index_F.clone()
        with torch.autocast(decoder_FD.device.type, enabled=False):
            self._renew(rows_FD, inverse_F, self.index_F, self.shortlist_MF)
        return Neighbors(self.index_F, self._look_at_one_more(rows_FD, inverse_F, self.index_F, self.shortlist_MF))

    def _renew(self, rows_FD: Tensor, inverse_F: Tensor, index_F: Tensor, shortlist_MF: Tensor) -> None:
        """Search the next rows' neighbours and shortlists anew."""
        rows = slice(self.cursor, min(self.cursor + self.rows, len(rows_FD)))
        found, near_RM = nearest_of_slice(rows_FD, inverse_F, rows.start, rows.stop, self.dtype, self.shortlist)
        stale_RD, rows_RD = unit_rows(rows_FD[index_F[rows]]), unit_rows(rows_FD[rows])
        self.churn = (found.index != index_F[rows]).float().mean()
        self.regret = (found.cosine - (rows_RD * stale_RD).sum(1)).clamp(min=0).mean()
        index_F[rows], shortlist_MF[:, rows] = found.index, near_RM.T
        self.cursor = rows.stop % len(rows_FD)

    def _look_at_one_more(self, rows_FD: Tensor, inverse_F: Tensor, index_F: Tensor, shortlist_MF: Tensor) -> Tensor:
        """Let every latent's neighbour and the next of its shortlist change places if that one is nearer.

        Returns the winners' cosines.
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
        """What a resumed run needs to go on as if never stopped."""
        return {"generator": self.generator.get_state(), **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.generator.set_state(state["generator"])
        for name in _STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)


def renewed_rows(width: int, steps: int) -> int:
    """Rows that the lagged table renews a step: 32, or as many as renew each every 512 steps and 20 times in a run."""
    return min(max(32, -(-width // 512), -(-20 * width // steps)), 1024, width)


def random_floor(width: int, d_in: int) -> float:
    """About the nearest-neighbour cosine of `width` random directions in `d_in` dimensions: √(2 ln F / D), 1 at most.

    An approximation for large D. It reaches 1 at D = 2 ln F, where it says nothing any more.
    """
    return min(1.0, math.sqrt(2 * math.log(width) / d_in))


def check_decoder(decoder: Tensor) -> None:
    """Raise ValueError unless `decoder` is a floating-point `[F, D]` with F ≥ 2."""
    if decoder.ndim != 2 or not decoder.is_floating_point():
        raise ValueError(
            f"decoder: expected floating-point [F, D], one row a latent, got {decoder.dtype} {list(decoder.shape)}"
        )
    if decoder.shape[0] < 2:
        raise ValueError(f"decoder: expected [F, D] with F ≥ 2 latents, got {list(decoder.shape)}: no pair to compare")


def check_rows(decoder: Tensor) -> None:
    """Raise ValueError, naming the first, if rows hold NaN, infinity, or entries whose squares overflow."""
    broken_F = ~at_least_fp32(decoder.detach()).norm(dim=1).isfinite()
    if broken_F.any():
        rows = broken_F.nonzero().squeeze(1).tolist()
        raise ValueError(
            f"decoder: row {rows[0]} has no finite norm (NaN, infinity or too large entries); {len(rows)} of "
            f"{len(broken_F)} rows are so, and no neighbour can be found"
        )


def inverse_norms(rows_FD: Tensor) -> Tensor:
    """1/‖d_i‖ `[F]`; large, not infinite, for a zero row, whose products with it are 0."""
    return rows_FD.norm(dim=1).clamp(min=1e-12).reciprocal()


def unit_rows(decoder_FD: Tensor) -> Tensor:
    """Rows of norm 1 in at least fp32; a zero row stays zero."""
    return F.normalize(at_least_fp32(decoder_FD), dim=1)
