"""Nearest neighbours in a dictionary, and whether they fire together.

The nearest-neighbour cosine is what C²R minimises: it is shown, and it is no evidence. Co-firing reads the pair's
behaviour: a high cosine with φ ≤ 0 looks like one feature split over two latents, with φ > 0 like a duplicate.

A alive latents · D width of the activations · F latents · N non-zeros · n tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from c2r.eval.results import Histogram, histogram
from c2r.neighbors import nearest_neighbors, random_floor


class Pairs(NamedTuple):
    """Each alive latent i, its nearest alive neighbour j, and how the two fire; empty with fewer than two alive."""

    latent_A: Tensor
    neighbor_A: Tensor
    cosine_A: Tensor
    phi_A: Tensor
    """φ = (n11·n00 − n10·n01) / √(n1·n0·n·1·n·0); NaN where one of the two always fires."""
    jaccard_A: Tensor
    """n11 / (n11 + n10 + n01)."""
    neighbor_given_latent_A: Tensor
    """P(j | i): how often j fires where i does."""
    latent_given_neighbor_A: Tensor
    """P(i | j)."""


class Cofiring:
    """Which latents fire on which tokens, how strongly, and from that how each fires with its nearest neighbour.

    Holds 12 bytes a non-zero.
    """

    def __init__(self, W_dec_FD: Tensor) -> None:
        self.W_dec_FD = W_dec_FD.detach()
        self.fired_F = torch.zeros(len(W_dec_FD), dtype=torch.long, device=W_dec_FD.device)
        self.tokens = 0
        self._fires: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, acts_nF: Tensor) -> None:
        """Count a batch of tokens."""
        tokens_N, latents_N = acts_nF.nonzero(as_tuple=True)
        self.fired_F += torch.bincount(latents_N, minlength=len(self.fired_F))
        self._fires.append(((tokens_N + self.tokens).int(), latents_N.int(), acts_nF[tokens_N, latents_N].float()))
        self.tokens += len(acts_nF)

    @cached_property
    def alive_A(self) -> Tensor:
        """Latents that fired; read it when all batches have been added."""
        return (self.fired_F > 0).nonzero().squeeze(1)

    @cached_property
    def pairs(self) -> Pairs:
        """Nearest neighbours among alive latents and their co-firing; read it when all batches have been added."""
        rows_AD = self.W_dec_FD[self.alive_A]
        if len(rows_AD) < 2:
            none = rows_AD.new_empty(0)
            return Pairs(self.alive_A[:0], self.alive_A[:0], none, none, none, none, none)
        near = nearest_neighbors(rows_AD)
        partner_A = self.alive_A[near.index]
        n, n1, m1 = float(self.tokens), self.fired_F[self.alive_A].double(), self.fired_F[partner_A].double()
        n11 = self._together(partner_A)[self.alive_A].double()
        n10, n01 = n1 - n11, m1 - n11
        n00 = n - n11 - n10 - n01
        phi_A = (n11 * n00 - n10 * n01) / (n1 * (n - n1) * m1 * (n - m1)).sqrt()
        return Pairs(self.alive_A, partner_A, near.cosine, phi_A, n11 / (n11 + n10 + n01), n11 / n1, n11 / m1)

    def top_tokens(self, latent: int, count: int) -> list[tuple[int, float]]:
        """The tokens on which a latent is strongest (in absolute value), and its activations there, strongest first."""
        hits = [(tokens_N[latents_N == latent], values_N[latents_N == latent])
                for tokens_N, latents_N, values_N in self._fires]  # fmt: skip
        tokens, values = (torch.cat(parts) for parts in zip(*hits, strict=True))
        best = values.abs().argsort(descending=True, stable=True)[:count]
        return list(zip(tokens[best].tolist(), values[best].tolist(), strict=True))

    def _together(self, partner_A: Tensor) -> Tensor:
        """On how many tokens each latent fires together with its partner, `[F]`."""
        width, both_F = len(self.fired_F), torch.zeros_like(self.fired_F)
        partner_F = torch.zeros_like(self.fired_F)
        partner_F[self.alive_A] = partner_A
        for tokens_N, latents_N, _ in self._fires:
            latents, start = latents_N.long(), tokens_N.long() * width
            hit = torch.isin(start + partner_F[latents], start + latents)
            both_F += torch.bincount(latents[hit], minlength=width)
        return both_F

    def metrics(self) -> dict[str, float]:
        """Summary over alive latents; cosines are the optimised quantity."""
        cosine = self.pairs.cosine_A
        quantiles = {
            f"max_cos_p{p}": cosine.quantile(p / 100).item() if len(cosine) else float("nan") for p in (50, 90, 99)
        }
        return {
            "max_cos_mean": _mean(cosine),
            **quantiles,
            **{f"max_cos_share_over_0_{t}": _mean((cosine > t / 10).double()) for t in (5, 7, 9)},
            "max_cos_random_floor": random_floor(*self.W_dec_FD.shape),
            "neighbor_phi_mean": _mean(self.pairs.phi_A),
            "neighbor_jaccard_mean": _mean(self.pairs.jaccard_A),
            "neighbor_given_latent_mean": _mean(self.pairs.neighbor_given_latent_A),
            "latent_given_neighbor_mean": _mean(self.pairs.latent_given_neighbor_A),
        }

    def histograms(self) -> dict[str, Histogram]:
        """What is drawn: `max_cos` and `phi` of alive latents."""
        return {"max_cos": histogram(self.pairs.cosine_A, 0, 1), "phi": histogram(self.pairs.phi_A, -0.2, 1)}


def _mean(values: Tensor) -> float:
    """Of the finite ones; NaN where there is none."""
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else float("nan")
