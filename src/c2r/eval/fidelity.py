"""Reconstruction and sparsity of an SAE, as running sums over tokens in float64.

n tokens of a batch · p tokens of a piece of it · D width of the activations · F latents · N non-zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.kernels.codes import Acts, Codes, Support, decode
from c2r.sae.model import SAE

_SUMS: tuple[str, ...] = (
    "square",
    "error",
    "cosine",
    "norm_in",
    "norm_out",
    "norm_ratio",
    "inner",
    "hat_square",
    "l0",
    "l1",
)
_PIECE = {"cpu": 2**22}
"""Largest number of latent activations computed at a time, by kind of device: 16 MiB in fp32 on a CPU."""
_PIECE_ELSEWHERE = 2**26
_SPARSE_BELOW = 1 / 16
"""If a smaller share of activations is non-zero, x̂ is computed from the non-zeros only."""


class Fidelity:
    """Running sums over tokens for all figures of reconstruction, sparsity and density of one SAE."""

    def __init__(self, width: int, d_in: int) -> None:
        self.tokens = 0
        self.sum_D = torch.zeros(d_in, dtype=torch.float64)
        self.sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
        self.legacy_error, self.legacy_batches = 0.0, 0
        self.fired_F = torch.zeros(width, dtype=torch.float64)

    def add(self, x_nD: Tensor, x_hat_nD: Tensor, acts_nF: Acts) -> None:
        """Count one batch of tokens."""
        self._add_activations(acts_nF)
        self._add_reconstruction(x_nD, x_hat_nD)

    def reconstruct(self, sae: SAE, x_nD: Tensor) -> Tensor:
        """Count one batch of tokens, and return the SAE's reconstructions x̂ `[n, D]`."""
        if not len(x_nD):
            return x_nD
        most = _PIECE.get(x_nD.device.type, _PIECE_ELSEWHERE)
        x_hat_nD = torch.empty_like(x_nD)
        size = max(1, most // sae.width)
        for x_pD, x_hat_pD in zip(x_nD.split(size), x_hat_nD.split(size), strict=True):
            acts = _sparse(sae.encode(x_pD))
            self._add_activations(acts)
            x_hat_pD.copy_(decode(acts, sae.W_dec, sae.b_dec) if isinstance(acts, Codes) else sae.decode(acts))
        self._add_reconstruction(x_nD, x_hat_nD)
        return x_hat_nD

    def joined(self, other: Fidelity) -> Fidelity:
        """The sums over the tokens of both."""
        both = Fidelity(len(self.fired_F), len(self.sum_D))
        both.tokens, both.sum_D = self.tokens + other.tokens, self.sum_D + other.sum_D
        both.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        both.legacy_error = self.legacy_error + other.legacy_error
        both.legacy_batches = self.legacy_batches + other.legacy_batches
        both.fired_F = self.fired_F + other.fired_F
        return both

    def _add_activations(self, acts: Acts) -> None:
        if isinstance(acts, Codes):
            fired_F = torch.bincount(acts.support.latents_N, minlength=acts.width)
            l0, values = fired_F.sum(), acts.values_N
        else:
            fired_F = (acts != 0).sum(0)
            l0, values = fired_F.sum(), acts
        self.sums["l0"] += l0.item()
        self.sums["l1"] += values.abs().sum(dtype=torch.float64).item()
        self.fired_F += fired_F.cpu()

    def _add_reconstruction(self, x_nD: Tensor, x_hat_nD: Tensor) -> None:
        x, x_hat = x_nD.double(), x_hat_nD.double()
        error_n, square_n, hat_square_n = ((y * y).sum(1) for y in (x - x_hat, x, x_hat))
        norm_n, hat_norm_n, inner_n = square_n.sqrt(), hat_square_n.sqrt(), (x * x_hat).sum(1)
        parts = {
            "square": square_n,
            "error": error_n,
            "cosine": F.cosine_similarity(x, x_hat, dim=1),
            "norm_in": norm_n,
            "norm_out": hat_norm_n,
            "norm_ratio": hat_norm_n / norm_n.clamp(min=1e-12),
            "inner": inner_n,
            "hat_square": hat_square_n,
            # SAEBench 0.6.0's EV, for comparison with published tables: per token, relative to the batch's mean.
            "legacy": 1 - error_n / (x - x.mean(0)).square().sum(1).clamp(min=1e-12),
        }
        found = dict(zip(parts, torch.stack(list(parts.values())).sum(1).tolist(), strict=True))
        self.legacy_error += found.pop("legacy") / len(x)
        self.legacy_batches += 1
        for name, value in found.items():
            self.sums[name] += value
        self.tokens += len(x)
        self.sum_D += x.sum(0).cpu()

    def metrics(self) -> dict[str, float]:
        """All figures. EV = 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², where x̄ is the mean over all tokens."""
        n = self.tokens
        mean = {name: value / n for name, value in self.sums.items()}
        variance = mean["square"] - (self.sum_D / n).square().sum().item()
        fvu = mean["error"] / variance if variance > 0 else float("nan")
        return {
            "tokens": n,
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "explained_variance_legacy": self.legacy_error / self.legacy_batches,
            "mse": mean["error"],
            "cossim": mean["cosine"],
            "l2_norm_in": mean["norm_in"],
            "l2_norm_out": mean["norm_out"],
            "l2_ratio": mean["norm_ratio"],
            "relative_reconstruction_bias": mean["hat_square"] / mean["inner"] if mean["inner"] else float("nan"),
            "l0": mean["l0"],
            "l1": mean["l1"],
            **self._densities(),
        }

    def _densities(self) -> dict[str, float]:
        density_F, figures = self.density_F, {}
        for percent in (1, 10):
            frequent = density_F > percent / 100
            share = density_F[frequent].sum() / density_F.sum().clamp(min=1e-12)
            figures[f"freq_over_{percent}_percent"] = frequent.double().mean().item()
            figures[f"normalized_freq_over_{percent}_percent"] = share.item()
        return figures | {"frac_alive": (density_F > 0).double().mean().item()}

    @property
    def density_F(self) -> Tensor:
        """P(z > 0) of each latent, `[F]`."""
        return self.fired_F / self.tokens


def _sparse(acts_nF: Tensor) -> Acts:
    """The activations as `Codes` if few are non-zero, else unchanged; half precision is always left unchanged."""
    if acts_nF.dtype not in (torch.float32, torch.float64):
        return acts_nF
    tokens_N, latents_N = acts_nF.nonzero(as_tuple=True)
    if len(tokens_N) > _SPARSE_BELOW * acts_nF.numel():
        return acts_nF
    return Codes(acts_nF[tokens_N, latents_N], Support(latents_N, tokens_N, *acts_nF.shape))
