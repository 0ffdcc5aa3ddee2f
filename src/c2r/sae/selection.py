"""Selection: which pre-activations become activations.

B tokens in a batch · D width of the activations · F latents · N non-zeros in a batch · C candidates ·
K latents per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from c2r.kernels.above import entries_above
from c2r.kernels.codes import Support
from c2r.kernels.int8 import coarse_product
from c2r.kernels.rows import row_dots, row_starts

_ROOM = 3.0
"""The floor is below the last cut by this multiple of the cut's mean relative change, plus 1 %."""
_LARGEST_SLACK = 0.1
"""Largest relative distance of the floor from the last cut."""
_CROWD, _SHARE, _FAILURES, _REST = 4, 1 / 32, 3, 100
"""int8 is not worth it if it leaves more than `_CROWD`·B·k candidates, or more than `_SHARE` of all entries.
After `_FAILURES` consecutive batches without success, it is not tried for `_REST` batches."""


@dataclass
class BatchTopK:
    """The B·k largest positive pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    The cut is the smallest selected value. A floor slightly below the last batch's cut leaves few more than B·k
    candidates, and the exact top-k runs only on these. If the floor leaves too few, one estimated from a sample of
    tokens is used instead, and finally 0. The result is always exact. The distance of the floor from the cut adapts to
    how much the cut changes between batches.
    """

    cut: float | None = None
    """The smallest value that the last batch kept."""
    move: float = _LARGEST_SLACK
    """Moving average of the cut's relative change between batches."""
    failures: int = 0
    """Consecutive batches for which the int8 product was of no use."""
    rest: int = 0
    """Batches left for which no int8 product is tried."""

    @torch.no_grad()
    def select(self, product_BF: Tensor, bias_F: Tensor, k: int) -> Support:
        """Positions of the `B·k` largest positive entries of product + bias; fewer if fewer are positive.

        The sum is not computed for all entries: a floor on it is a floor on the product that differs by latent.
        """
        batch, width = product_BF.shape
        total = min(batch * k, product_BF.numel())
        values, chosen = self._candidates(product_BF, bias_F, total)
        if len(values) > total:
            values, among = values.topk(total, sorted=False)
            chosen = chosen[among]
        self._follow(values.min().item() if len(values) else None)
        return _support(chosen, batch, width)

    @torch.no_grad()
    def select_coarsely(self, x_BD: Tensor, W_FD: Tensor, bias_F: Tensor, k: int) -> tuple[Support, Tensor] | None:
        """Like `select` for x·Wᵀ + bias in fp32, whose selected values `[N]` are returned too; int8 finds candidates.

        None if int8 is not supported or not worth it: before there is a cut, if the cut fell below the floor, or if
        rounding leaves too many candidates, as for tokens or latents with a few huge entries.
        """
        if self.rest:
            self.rest -= 1
            return None
        found = self._best_of_few(x_BD, W_FD, bias_F, min(k, len(W_FD)) * len(x_BD))
        self.failures = 0 if found else self.failures + 1
        if self.failures == _FAILURES:
            self.failures, self.rest = 0, _REST
        return found

    def _best_of_few(self, x_BD: Tensor, W_FD: Tensor, bias_F: Tensor, total: int) -> tuple[Support, Tensor] | None:
        floor, (batch, width) = self._floor(), (len(x_BD), len(W_FD))
        most = min(_CROWD * total, int(_SHARE * batch * width))
        if floor is None or floor <= 0 or total > most or (coarse := coarse_product(x_BD, W_FD)) is None:
            return None
        found = entries_above(coarse.product_FB, coarse.floor(floor - bias_F))
        if not total <= len(found.values) <= most:
            return None
        places_C = (found.rows * batch + coarse.tokens_B[found.columns]).sort().values  # latent by latent
        latents_C, tokens_C = places_C // batch, places_C % batch
        values_C = row_dots(W_FD, x_BD, tokens_C, row_starts(latents_C, width)) + bias_F[latents_C]
        best = values_C.topk(total, sorted=False)
        cut = best.values.min().item()
        if cut < floor:  # entries between cut and floor may be missing
            return None
        self._follow(cut)
        places_N, order_N = (tokens_C * width + latents_C)[best.indices].sort()
        return Support(places_N % width, places_N // width, batch, width), best.values[order_N]

    def _floor(self) -> float | None:
        """A value slightly below the last cut; None if there is no cut yet."""
        return None if not self.cut else self.cut * (1 - min(0.01 + _ROOM * self.move, _LARGEST_SLACK))

    def _follow(self, cut: float | None) -> None:
        if cut and self.cut:
            self.move += 0.1 * (abs(cut / self.cut - 1) - self.move)
        self.cut = cut

    def _candidates(self, product_BF: Tensor, bias_F: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Positive pre-activations that may be among the `total` largest, and their indices in the flattened matrix."""

        def above(floor: float) -> tuple[Tensor, Tensor]:
            found = entries_above(product_BF, floor - bias_F, dim=0)
            return found.values + bias_F[found.columns], found.rows * product_BF.shape[1] + found.columns

        values, places = bias_F[:0], None
        floor = self._floor()
        if floor is not None:
            values, places = above(floor)
        if places is None or len(values) < total:
            values, places = above(self._sampled_floor(product_BF, bias_F, total))
        if len(values) < total:
            values, places = above(0.0)
        return values, places

    def _sampled_floor(self, product_BF: Tensor, bias_F: Tensor, total: int) -> float:
        """A floor estimated from every 16th token, at least 0."""
        sample = product_BF[::16] + bias_F
        cut = sample.flatten().topk(max(1, total * len(sample) // len(product_BF)), sorted=False).values.min().item()
        return max(cut * (1 - _LARGEST_SLACK), 0.0)


@torch.no_grad()
def support_above(product_BF: Tensor, floor_F: Tensor) -> Support:
    """Positions at which `product_BF` is above the floor of the latent."""
    found = entries_above(product_BF, floor_F, dim=0)
    return _support(found.rows * product_BF.shape[1] + found.columns, *product_BF.shape)


def _support(places_N: Tensor, batch: int, width: int) -> Support:
    """The support with these indices in the flattened matrix, in any order."""
    ordered_N = places_N.sort().values
    return Support(ordered_N % width, ordered_N // width, batch, width)


@torch.no_grad()
def top_k_of_each_token(pre_BF: Tensor, k: int, *, signed: bool = False) -> Support:
    """Positions of the `k` largest positive entries of each row (Gao et al. 2024); if `signed`, by absolute value."""
    batch, width = pre_BF.shape
    best = (pre_BF.abs() if signed else pre_BF).topk(min(k, width), dim=1, sorted=False)
    latents_BK = best.indices.sort(dim=1).values
    kept_BK = pre_BF.gather(1, latents_BK) != 0 if signed else pre_BF.gather(1, latents_BK) > 0
    tokens_BK = torch.arange(batch, device=pre_BF.device)[:, None].expand_as(latents_BK)
    return Support(latents_BK[kept_BK], tokens_BK[kept_BK], batch, width)
