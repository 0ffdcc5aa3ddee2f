"""Loss terms: pure functions of one forward pass, each a scalar.

B tokens in a batch · D width of the activations · F latents · N selected (token, latent) entries · Z dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.kernels.codes import Acts, Codes, decode, decode_groups
from c2r.penalty import pair_cosines
from c2r.sae.model import SAE


class Encoded(NamedTuple):
    """Output of a method's encoder."""

    acts: Acts
    """The activations to decode."""
    gate: Acts | None = None
    """For gated: ReLU of the gate's pre-activations, on which L1 and C²R act."""
    pre: Acts | None = None
    """For jump_relu: the pre-activations (if sparse, those near or above their threshold)."""
    ends: tuple[int, ...] = ()
    """For matryoshka: ends of the prefixes of latents that must each reconstruct; empty otherwise."""
    found_by_int8: bool = False
    """For batch-top-k: whether an int8 product found the candidates."""

    @property
    def penalised(self) -> Acts:
        """The activations on which C²R acts."""
        return self.acts if self.gate is None else self.gate


@dataclass(frozen=True)
class Forward:
    """One forward pass, the input of the loss terms."""

    sae: SAE
    x_BD: Tensor
    encoded: Encoded
    dead_F: Tensor
    """Dead latents, bool `[F]`."""

    @cached_property
    def prefixes(self) -> list[Tensor]:
        """Reconstructions `[B, D]`, one per prefix of latents; the last uses all latents."""
        sae, acts = self.sae, self.encoded.acts
        if not self.encoded.ends:
            return [decode(acts, sae.W_dec, sae.b_dec)]
        return decode_groups(acts, sae.W_dec, sae.b_dec, self.encoded.ends)

    @cached_property
    def error_BD(self) -> Tensor:
        """x − x̂."""
        return self.x_BD - self.prefixes[-1]


def reconstruction(forward: Forward, weights: tuple[float, ...] = (1.0,)) -> Tensor:
    """Mean over tokens of ‖x − x̂‖², as a weighted sum over prefixes (Bussmann et al. 2025, arXiv 2503.17547)."""
    errors = [
        weight * (forward.x_BD - x_hat_BD).square().sum(1).mean()
        for weight, x_hat_BD in zip(weights, forward.prefixes, strict=True)
    ]
    return reduce(torch.add, errors)


def aux_k(forward: Forward, k: int, *, signed: bool = False) -> Tensor:
    """AuxK: FVU of the residual when the top `k` dead latents reconstruct it (Gao et al. 2024, arXiv 2406.04093).

    The residual is detached, so that only the dead latents' encoder and decoder rows receive a gradient. With `signed`,
    each token's latents largest in absolute value are used, with their sign.
    """
    dead_Z = forward.dead_F.nonzero().squeeze(1)
    if len(dead_Z) == 0:
        return forward.x_BD.new_zeros(())
    sae, residual_BD = forward.sae, forward.error_BD.detach()
    pre_BZ = F.linear(sae.centred(forward.x_BD), sae.W_enc[dead_Z], sae.b_enc[dead_Z])
    acts_BZ = pre_BZ if signed else F.relu(pre_BZ)
    if k < len(dead_Z):
        best = acts_BZ.abs().topk(k, dim=1, sorted=False).indices
        acts_BZ = torch.zeros_like(acts_BZ).scatter(1, best, acts_BZ.gather(1, best))
    missed = (residual_BD - acts_BZ @ sae.W_dec[dead_Z]).square().sum(1).mean()
    variance = (residual_BD - residual_BD.mean(0)).square().sum(1).mean()
    return missed / variance if variance > 0 else missed.new_zeros(())


def l1(acts: Acts, norms_F: Tensor | None = None) -> Tensor:
    """Mean over tokens of Σ f_i, or of Σ f_i·‖d_i‖ if the decoder norms `norms_F` are given."""
    values, tokens = _values(acts)
    if norms_F is not None:
        values = values * (norms_F[acts.support.latents_N] if isinstance(acts, Codes) else norms_F)
    return values.sum() / tokens


def lp(acts: Acts, p: float, floor: float = 1e-6) -> Tensor:
    """Mean over tokens of Σ f_iᵖ (Karvonen et al. 2024, arXiv 2408.00113).

    Activations below `floor` count as 0 and have no gradient, since the gradient of fᵖ is unbounded near 0.
    """
    values, tokens = _values(acts)
    active = values > floor
    return values.masked_fill(~active, 1.0).pow(p).masked_fill(~active, 0.0).sum() / tokens


def _values(acts: Acts) -> tuple[Tensor, int]:
    """The activations' values, and the number of tokens."""
    return (acts.values_N, acts.support.batch) if isinstance(acts, Codes) else (acts, len(acts))


def gate_reconstruction(forward: Forward) -> Tensor:
    """Mean over tokens of ‖x − x̂‖² for x̂ decoded from the gate alone; the decoder is detached (arXiv 2404.16014)."""
    assert forward.encoded.gate is not None
    x_hat_BD = decode(forward.encoded.gate, forward.sae.W_dec.detach(), forward.sae.b_dec.detach())
    return (forward.x_BD - x_hat_BD).square().sum(1).mean()


def orthogonality(W_dec_FD: Tensor, neighbors_F: Tensor, cosine_F: Tensor | None = None) -> Tensor:
    """Mean over latents of relu(max cos)² (OrtSAE, Korznikov et al. 2025, arXiv 2509.22033)."""
    return F.relu(pair_cosines(W_dec_FD, neighbors_F, cosine_F)).square().mean()
