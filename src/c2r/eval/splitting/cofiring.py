"""Nearest neighbours in a dictionary, and whether they fire together.

C²R minimises the nearest-neighbour cosine, so that figure is reported but is no evidence for it. Co-firing describes
how a pair behaves: with a high cosine, φ ≤ 0 looks like one feature split over two latents, φ > 0 like a duplicate. Its
mean over nearest neighbours is affected by C²R too: pushing rows apart moves nearest neighbours further away, and pairs
that are further apart fire together less often. `Cofiring.at_cosine` therefore selects pairs with the same cosine in
every dictionary.

A alive latents · D width of the activations · F latents · N non-zeros · n tokens · P pairs · R rows of a piece.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from c2r.eval.results import Histogram, histogram
from c2r.neighbors import nearest_neighbors, random_floor, unit_rows


class Pairs(NamedTuple):
    """Alive latents i with an alive partner j each, and their co-firing; empty if fewer than two latents are alive."""

    latent_A: Tensor
    neighbor_A: Tensor
    cosine_A: Tensor
    phi_A: Tensor
    """φ = (n11·n00 − n10·n01) / √(n1·n0·n·1·n·0); NaN if one of the two always fires."""
    jaccard_A: Tensor
    """n11 / (n11 + n10 + n01)."""
    neighbor_given_latent_A: Tensor
    """P(j | i): share of the tokens on which i fires on which j fires too."""
    latent_given_neighbor_A: Tensor
    """P(i | j)."""


class Cofiring:
    """Records which latents fire on which tokens and how strongly, and computes their co-firing.

    Needs 12 bytes per non-zero.
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
        """Latents that fired; access it only after all batches have been added."""
        return (self.fired_F > 0).nonzero().squeeze(1)

    @cached_property
    def pairs(self) -> Pairs:
        """Nearest neighbours among alive latents, and their co-firing; access it only after all batches are added."""
        rows_AD = self.W_dec_FD[self.alive_A]
        if len(rows_AD) < 2:
            return self._none()
        near = nearest_neighbors(rows_AD)
        return self._fire(self.alive_A, self.alive_A[near.index], near.cosine)

    def at_cosine(self, cosine: float, *, most: int = 2048, seed: int = 0) -> Pairs:
        """Alive latents, each paired with the alive latent whose cosine with it is nearest to `cosine`.

        Arguments:
            most: if more latents are alive, a random sample of this size is used.
            seed: seed of the sample.
        """
        unit_AD = unit_rows(self.W_dec_FD[self.alive_A])
        if len(unit_AD) < 2:
            return self._none()
        order = torch.randperm(len(unit_AD), generator=torch.Generator().manual_seed(seed))
        picked_P = order[:most].sort().values.to(unit_AD.device)
        found: list[tuple[Tensor, Tensor]] = []
        for rows in picked_P.split(max(1, 2**25 // len(unit_AD))):
            cosine_RA = unit_AD[rows] @ unit_AD.T
            away_RA = (cosine_RA - cosine).abs()
            away_RA[torch.arange(len(rows)), rows] = torch.inf  # never its own partner
            partner_R = away_RA.argmin(1)
            found.append((partner_R, cosine_RA.gather(1, partner_R[:, None])[:, 0]))
        partner_P, cosine_P = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self._fire(self.alive_A[picked_P], self.alive_A[partner_P], cosine_P)

    def _none(self) -> Pairs:
        none = self.W_dec_FD.new_empty(0)
        return Pairs(self.alive_A[:0], self.alive_A[:0], none, none, none, none, none)

    def _fire(self, latent_P: Tensor, partner_P: Tensor, cosine_P: Tensor) -> Pairs:
        """The co-firing of pairs; each latent is the first of at most one pair."""
        n, n1, m1 = float(self.tokens), self.fired_F[latent_P].double(), self.fired_F[partner_P].double()
        n11 = self._together(latent_P, partner_P).double()
        n10, n01 = n1 - n11, m1 - n11
        n00 = n - n11 - n10 - n01
        phi_P = (n11 * n00 - n10 * n01) / (n1 * (n - n1) * m1 * (n - m1)).sqrt()
        return Pairs(latent_P, partner_P, cosine_P, phi_P, n11 / (n11 + n10 + n01), n11 / n1, n11 / m1)

    def top_tokens(self, latent: int, count: int) -> list[tuple[int, float]]:
        """The tokens on which a latent's |activation| is largest, with its activations there, strongest first."""
        hits = [(tokens_N[latents_N == latent], values_N[latents_N == latent])
                for tokens_N, latents_N, values_N in self._fires]  # fmt: skip
        tokens, values = (torch.cat(parts) for parts in zip(*hits, strict=True))
        best = values.abs().argsort(descending=True, stable=True)[:count]
        return list(zip(tokens[best].tolist(), values[best].tolist(), strict=True))

    def _together(self, latent_P: Tensor, partner_P: Tensor) -> Tensor:
        """Number of tokens on which each latent fires together with its partner, `[P]`."""
        width, both_F = len(self.fired_F), torch.zeros_like(self.fired_F)
        partner_F = torch.full_like(self.fired_F, -1)
        partner_F[latent_P] = partner_P
        for tokens_N, latents_N, _ in self._fires:
            latents, start = latents_N.long(), tokens_N.long() * width
            asked = partner_F[latents] >= 0
            hit = torch.isin(start[asked] + partner_F[latents[asked]], start + latents)
            both_F += torch.bincount(latents[asked][hit], minlength=width)
        return both_F[latent_P]

    def metrics(self) -> dict[str, float]:
        """Summary over alive latents. C²R optimises the cosines, and the co-firing of neighbours changes with them."""
        cosine = self.pairs.cosine_A
        quantiles = {
            f"max_cos_p{p}": cosine.quantile(p / 100).item() if len(cosine) else float("nan") for p in (50, 90, 99)
        }
        return {
            "max_cos_mean": mean_of_finite(cosine),
            **quantiles,
            **{f"max_cos_share_over_0_{t}": mean_of_finite((cosine > t / 10).double()) for t in (5, 7, 9)},
            # For as many random directions as there are alive latents.
            "max_cos_random_floor": random_floor(len(cosine), self.W_dec_FD.shape[1]) if len(cosine) else float("nan"),
            "neighbor_phi_mean": mean_of_finite(self.pairs.phi_A),
            "neighbor_jaccard_mean": mean_of_finite(self.pairs.jaccard_A),
            "neighbor_given_latent_mean": mean_of_finite(self.pairs.neighbor_given_latent_A),
            "latent_given_neighbor_mean": mean_of_finite(self.pairs.latent_given_neighbor_A),
        }

    def histograms(self) -> dict[str, Histogram]:
        """Histograms for plots: `max_cos` and `phi` of alive latents."""
        return {"max_cos": histogram(self.pairs.cosine_A, 0, 1), "phi": histogram(self.pairs.phi_A, -0.2, 1)}


def mean_of_finite(values: Tensor) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else float("nan")
