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

from c2r.codes import at_least_fp32
from c2r.tiles import nearest_in_tiles, nearest_of_slice

Mode = Literal["exact", "chunked"]


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
        ValueError: not `[F, D]`, F < 2, an unknown mode, chunk < 2.
    """
    check_decoder(decoder)
    if mode not in ("exact", "chunked"):
        raise ValueError(f"mode: got {mode!r}; accepted are 'exact' and 'chunked'")
    unit_FD = unit_rows(decoder)
    if mode == "exact":
        return Neighbors(*nearest_in_tiles(unit_FD))
    if chunk < 2:
        raise ValueError(f"chunk: got {chunk}; accepted are whole numbers ≥ 2")
    index_F = torch.arange(len(decoder), device=decoder.device)
    cosine_F = unit_FD.new_zeros(len(decoder))
    for members in torch.randperm(len(decoder), generator=generator).to(decoder.device).split(chunk):
        if len(members) > 1:
            found = nearest_in_tiles(unit_FD[members])
            index_F[members] = members[found.index]
            cosine_F[members] = found.cosine
    return Neighbors(index_F, cosine_F)


class NeighborTable:
    """Nearest neighbours kept up to date while a decoder is trained.

    "lagged" (the default of training) is exact when made and afterwards renews `rows` of its rows a call, in turn, so
    that its cost grows as F and not as F². The cosine of a stale neighbour is recomputed from the current decoder, and
    is never more than the true neighbour's. "exact" and "chunked" search anew at every call.

    Arguments:
        mode: "lagged", "exact" or "chunked".
        rows: how many rows "lagged" renews a call; all of them within F/rows calls.
        chunk: rows a chunk of "chunked".
        dtype: of the product with which "lagged" finds candidates; they are compared in fp32.
        seed: of the permutations of "chunked".
    """

    def __init__(
        self,
        mode: Literal["lagged", "exact", "chunked"] = "lagged",
        *,
        rows: int = 128,
        chunk: int = 8192,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.mode: Literal["lagged", "exact", "chunked"] = mode
        self.rows, self.chunk, self.dtype = rows, chunk, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.index_F: Tensor | None = None
        self.cursor = 0
        self.churn = self.regret = torch.zeros(())
        """Of the rows "lagged" renewed last: the share whose neighbour changed, and the mean cosine gained by it."""

    @torch.no_grad()
    def refresh(self, decoder_FD: Tensor) -> Tensor:
        """Neighbours `[F]` for the decoder as it is now."""
        if self.mode == "chunked":
            return nearest_neighbors(decoder_FD, mode="chunked", chunk=self.chunk, generator=self.generator).index
        if self.mode == "exact" or self.index_F is None:
            check_decoder(decoder_FD)
            self.index_F = nearest_in_tiles(unit_rows(decoder_FD)).index
            return self.index_F
        width = len(decoder_FD)
        start, stop = self.cursor, min(self.cursor + self.rows, width)
        stale_R, found = self.index_F[start:stop], nearest_of_slice(decoder_FD, start, stop, self.dtype)
        rows_RD, stale_RD = unit_rows(decoder_FD[start:stop]), unit_rows(decoder_FD[stale_R])
        self.churn = (found.index != stale_R).float().mean()
        self.regret = (found.cosine - (rows_RD * stale_RD).sum(1)).clamp(min=0).mean()
        # A new tensor each time: the last one may still be part of an autograd graph.
        self.index_F = self.index_F.clone()
        self.index_F[start:stop] = found.index
        self.cursor = stop % width
        return self.index_F

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if never stopped."""
        measured = {"churn": self.churn, "regret": self.regret}
        return {"index": self.index_F, "cursor": self.cursor, "generator": self.generator.get_state(), **measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.index_F, self.cursor = state["index"], state["cursor"]
        self.churn, self.regret = state["churn"], state["regret"]
        self.generator.set_state(state["generator"])


def random_floor(width: int, d_in: int) -> float:
    """About the nearest-neighbour cosine of `width` random directions in `d_in` dimensions: √(2 ln F / D)."""
    return math.sqrt(2 * math.log(width) / d_in)


def check_decoder(decoder: Tensor) -> None:
    """Raise ValueError unless `decoder` is a floating-point `[F, D]` with F ≥ 2."""
    if decoder.ndim != 2 or not decoder.is_floating_point():
        raise ValueError(
            f"decoder: expected floating-point [F, D], one row a latent, got {decoder.dtype} {list(decoder.shape)}"
        )
    if decoder.shape[0] < 2:
        raise ValueError(f"decoder: expected [F, D] with F ≥ 2 latents, got {list(decoder.shape)}: no pair to compare")


def unit_rows(decoder_FD: Tensor) -> Tensor:
    """Rows of norm 1 in at least fp32; a zero row stays zero."""
    return F.normalize(at_least_fp32(decoder_FD), dim=1)
