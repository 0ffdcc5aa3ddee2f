"""Nearest neighbours in a dictionary, and whether they fire together.

The nearest-neighbour cosine is what C²R minimises: it is shown, and it is no evidence. Co-firing reads the pair's
behaviour: a high cosine with φ ≤ 0 looks like one feature split over two latents, with φ > 0 like a duplicate.

D width of the activations · F latents · n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from c2r.eval.results import Histogram, histogram
from c2r.neighbors import nearest_neighbors, random_floor


class Cofiring:
    """Counts of each latent and its nearest neighbour firing, over tokens."""

    def __init__(self, W_dec_FD: Tensor) -> None:
        self.W_dec_FD = W_dec_FD.detach()
        self.neighbor_F = nearest_neighbors(self.W_dec_FD).index
        self.fired_F = torch.zeros(len(W_dec_FD), dtype=torch.long, device=W_dec_FD.device)
        self.both_F = torch.zeros_like(self.fired_F)
        self.tokens = 0

    def add(self, acts_nF: Tensor) -> None:
        """Count a batch of tokens."""
        fires_nF = acts_nF != 0
        self.fired_F += fires_nF.sum(0)
        self.both_F += (fires_nF & fires_nF[:, self.neighbor_F]).sum(0)
        self.tokens += len(acts_nF)

    def phi(self) -> Tensor:
        """φ = (n11·n00 − n10·n01) / √(n1·n0·n·1·n·0) of each latent and its neighbour `[F]`; NaN if one is constant."""
        n, n1, m1 = float(self.tokens), self.fired_F.double(), self.fired_F[self.neighbor_F].double()
        n11 = self.both_F.double()
        n10, n01 = n1 - n11, m1 - n11
        n00 = n - n11 - n10 - n01
        return (n11 * n00 - n10 * n01) / (n1 * (n - n1) * m1 * (n - m1)).sqrt()

    def max_cos(self) -> Tensor:
        """Nearest-neighbour cosine among alive latents, one value an alive latent; empty with fewer than two."""
        alive_AD = self.W_dec_FD[self.fired_F > 0]
        return nearest_neighbors(alive_AD).cosine if len(alive_AD) > 1 else alive_AD.new_empty(0)

    def metrics(self) -> dict[str, float]:
        """Summary of both; cosines are the optimised quantity."""
        cosine, phi = self.max_cos(), self.phi()
        phi, nan = phi[phi.isfinite()], float("nan")
        quantiles = {f"max_cos_p{p}": cosine.quantile(p / 100).item() if len(cosine) else nan for p in (50, 90, 99)}
        shares = {
            f"max_cos_share_over_0_{t}": (cosine > t / 10).double().mean().item() if len(cosine) else nan
            for t in (5, 7, 9)
        }
        return {
            "max_cos_mean": cosine.mean().item() if len(cosine) else nan,
            **quantiles,
            **shares,
            "max_cos_random_floor": random_floor(*self.W_dec_FD.shape),
            "neighbor_phi_mean": phi.mean().item() if len(phi) else nan,
        }

    def histograms(self) -> dict[str, Histogram]:
        """What is drawn: `max_cos` and `phi` of alive latents."""
        return {"max_cos": histogram(self.max_cos(), 0, 1), "phi": histogram(self.phi(), -0.2, 1)}
