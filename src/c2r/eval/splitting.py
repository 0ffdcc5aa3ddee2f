"""Nearest neighbours in a dictionary, and whether they fire together.

The nearest-neighbour cosine is what C²R minimises: it is shown, and it is no evidence. Co-firing reads the pair's
behaviour: a high cosine with φ ≤ 0 looks like one feature split over two latents, with φ > 0 like a duplicate.

D width of the activations · F latents · n tokens.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from c2r.eval.bench import Bench, Outcome, each
from c2r.eval.results import Histogram, histogram
from c2r.neighbors import Neighbors, nearest_neighbors, random_floor
from c2r.sae.base import SAE


class Cofiring:
    """Which latents fire on which tokens, and from that how each alive latent fires with its nearest alive neighbour.

    Holds two integers a non-zero.
    """

    def __init__(self, W_dec_FD: Tensor) -> None:
        self.W_dec_FD = W_dec_FD.detach()
        self.fired_F = torch.zeros(len(W_dec_FD), dtype=torch.long, device=W_dec_FD.device)
        self.tokens = 0
        self._fires: list[tuple[Tensor, Tensor]] = []

    def add(self, acts_nF: Tensor) -> None:
        """Count a batch of tokens."""
        tokens_N, latents_N = acts_nF.nonzero(as_tuple=True)
        self.fired_F += torch.bincount(latents_N, minlength=len(self.fired_F))
        self._fires.append((tokens_N.int(), latents_N.int()))
        self.tokens += len(acts_nF)

    @cached_property
    def alive_A(self) -> Tensor:
        """Latents that fired; read it when all batches have been added."""
        return (self.fired_F > 0).nonzero().squeeze(1)

    @cached_property
    def neighbors(self) -> Neighbors:
        """Nearest neighbours among alive latents, `index` counting in `alive_A`; empty with fewer than two."""
        rows_AD = self.W_dec_FD[self.alive_A]
        if len(rows_AD) < 2:
            return Neighbors(self.alive_A[:0], rows_AD.new_empty(0))
        return nearest_neighbors(rows_AD)

    def max_cos(self) -> Tensor:
        """Nearest-neighbour cosine among alive latents, one value an alive latent."""
        return self.neighbors.cosine

    def phi(self) -> Tensor:
        """φ = (n11·n00 − n10·n01) / √(n1·n0·n·1·n·0) of each alive latent and its neighbour; NaN if one is constant."""
        if len(self.neighbors.index) == 0:
            return self.W_dec_FD.new_empty(0)
        partner_A = self.alive_A[self.neighbors.index]
        n, n1, m1 = float(self.tokens), self.fired_F[self.alive_A].double(), self.fired_F[partner_A].double()
        n11 = self._together(partner_A)[self.alive_A].double()
        n10, n01 = n1 - n11, m1 - n11
        n00 = n - n11 - n10 - n01
        return (n11 * n00 - n10 * n01) / (n1 * (n - n1) * m1 * (n - m1)).sqrt()

    def _together(self, partner_A: Tensor) -> Tensor:
        """On how many tokens each latent fires together with its partner, `[F]`."""
        width, both_F = len(self.fired_F), torch.zeros_like(self.fired_F)
        partner_F = torch.zeros_like(self.fired_F)
        partner_F[self.alive_A] = partner_A
        for tokens_N, latents_N in self._fires:
            latents, start = latents_N.long(), tokens_N.long() * width
            hit = torch.isin(start + partner_F[latents], start + latents)
            both_F += torch.bincount(latents[hit], minlength=width)
        return both_F

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


@torch.no_grad()
def evaluate_splitting(bench: Bench, name: str, sae: SAE) -> Outcome:
    """Nearest neighbours among alive latents and their co-firing, on the bench's text."""
    pairs = Cofiring(sae.W_dec)
    for x_nD in bench.activations.x_nD.split(2048):
        pairs.add(sae.encode(x_nD.to(sae.W_dec.device)))
    figures = pairs.metrics()
    shown = {key: value for key, value in figures.items() if key.startswith("max_cos")}
    return Outcome(
        name,
        "splitting",
        {"splitting": figures},
        {"neighbor_phi": figures["neighbor_phi_mean"], **shown},
        unstructured=dict(pairs.histograms()),
    )


run_splitting = each("splitting", evaluate_splitting)
