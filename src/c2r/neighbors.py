"""Nearest decoder rows by cosine: the search behind C²R's penalty and behind the splitting evaluations.

Nothing here records gradients or holds an F×F matrix. A latent is never its own neighbour, except where it has
none (the only member of a chunk): then `index[i] == i` and `cosine[i] == 0`.

D width of the activations · F latents · R rows of a tile.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from c2r.codes import at_least_fp32

Mode = Literal["exact", "chunked"]
TILE = 2048


class Neighbors(NamedTuple):
    """The nearest neighbour of every latent."""

    index: Int[Tensor, " F"]  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple's method, not used)
    """j*(i), int64; the lowest index among equals of a tile row."""
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
        return _search_tiles(unit_FD)
    if chunk < 2:
        raise ValueError(f"chunk: got {chunk}; accepted are whole numbers ≥ 2")
    index_F = torch.arange(len(decoder), device=decoder.device)
    cosine_F = unit_FD.new_zeros(len(decoder))
    for members in torch.randperm(len(decoder), generator=generator).to(decoder.device).split(chunk):
        if len(members) > 1:
            found = _search_tiles(unit_FD[members])
            index_F[members] = members[found.index]
            cosine_F[members] = found.cosine
    return Neighbors(index_F, cosine_F)


class NeighborTable:
    """Nearest neighbours kept up to date while a decoder is trained.

    "lagged" (the default of training) is exact when made and afterwards renews a slice of its rows a call, all of
    them within `cycle` calls. The cosine of a stale neighbour is recomputed from the current decoder, and is never
    more than the true neighbour's. "exact" and "chunked" search anew at every call.

    Arguments:
        mode: "lagged", "exact" or "chunked".
        cycle: calls in which "lagged" renews every row.
        chunk: rows a chunk of "chunked".
        dtype: precision of the lagged and the exact search; bfloat16 may take the second best of two that differ by
            1 %. The cosine that the penalty uses is recomputed in fp32 either way.
        seed: of the permutations of "chunked".
    """

    def __init__(
        self,
        mode: Literal["lagged", "exact", "chunked"] = "lagged",
        *,
        cycle: int = 64,
        chunk: int = 8192,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.mode: Literal["lagged", "exact", "chunked"] = mode
        self.cycle, self.chunk, self.dtype = cycle, chunk, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.index_F: Tensor | None = None
        self.cursor = 0

    @torch.no_grad()
    def refresh(self, decoder_FD: Tensor) -> Tensor:
        """Neighbours `[F]` for the decoder as it is now."""
        if self.mode == "chunked":
            return nearest_neighbors(decoder_FD, mode="chunked", chunk=self.chunk, generator=self.generator).index
        if self.mode == "exact" or self.index_F is None:
            check_decoder(decoder_FD)
            self.index_F = _search_tiles(unit_rows(decoder_FD).to(self.dtype)).index
            return self.index_F
        width = len(decoder_FD)
        size = -(-width // self.cycle)
        start, stop = self.cursor, min(self.cursor + size, width)
        # A row's own norm does not change who is nearest to it; the others' are divided out after the product.
        rows_FD = decoder_FD.to(self.dtype)
        inverse_F = at_least_fp32(decoder_FD).norm(dim=1).clamp(min=1e-12).reciprocal().to(self.dtype)
        # A new tensor each time: the last one may still be part of an autograd graph.
        self.index_F = self.index_F.clone()
        cosine_RF = (rows_FD[start:stop] @ rows_FD.T).mul_(inverse_F)
        cosine_RF.diagonal(offset=start).fill_(-torch.inf)
        self.index_F[start:stop] = cosine_RF.argmax(1)
        self.cursor = stop % width
        return self.index_F

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if never stopped."""
        return {"index": self.index_F, "cursor": self.cursor, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.index_F, self.cursor = state["index"], state["cursor"]
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


def _search_tiles(unit_FD: Tensor) -> Neighbors:
    """Every pair once: tiles of the upper triangle, each read along its rows and along its columns."""
    width = len(unit_FD)
    index_F = torch.zeros(width, dtype=torch.long, device=unit_FD.device)
    cosine_F = unit_FD.new_full((width,), -torch.inf)

    def offer(rows: slice, best: torch.return_types.max, offset: int) -> None:
        better = best.values > cosine_F[rows]
        cosine_F[rows] = torch.where(better, best.values, cosine_F[rows])
        index_F[rows] = torch.where(better, best.indices + offset, index_F[rows])

    for top in range(0, width, TILE):
        rows = slice(top, min(top + TILE, width))
        for left in range(top, width, TILE):
            columns = slice(left, min(left + TILE, width))
            cosine_RR = unit_FD[rows] @ unit_FD[columns].T
            if left == top:
                cosine_RR.fill_diagonal_(-torch.inf)
            else:
                offer(columns, cosine_RR.max(0), top)
            offer(rows, cosine_RR.max(1), left)
    return Neighbors(index_F, cosine_F.clamp(-1.0, 1.0))
