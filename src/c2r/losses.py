"""Terms of the training objectives: pure functions of one forward pass, each a scalar.

B tokens in a batch · D width of the activations · F latents · Z dead latents.
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
    """What a method's encoder emits."""

    acts: Acts
    """What is decoded."""
    gate: Acts | None = None
    """gated: the gate's ReLU'd pre-activations, which is what L1 and C²R see."""
    pre: Acts | None = None
    """jump_relu: pre-activations, all those near or above their threshold."""
    ends: tuple[int, ...] = ()
    """matryoshka: where the prefixes of latents end that must reconstruct alone; empty where only all must."""
    found_by_int8: bool = False
    """batch-top-k: whether a product in int8 found the candidates."""

    @property
    def penalised(self) -> Acts:
        """The activations that C²R sees."""
        return self.acts if self.gate is None else self.gate


@dataclass(frozen=True)
class Forward:
    """One forward pass, for the terms to read."""

    sae: SAE
    x_BD: Tensor
    encoded: Encoded
    dead_F: Tensor
    """Latents that have been silent for too long, bool `[F]`."""

    @cached_property
    def prefixes(self) -> list[Tensor]:
        """Reconstruction `[B, D]` from each prefix of latents; the last from all of them."""
        sae, acts = self.sae, self.encoded.acts
        if not self.encoded.ends:
            return [decode(acts, sae.W_dec, sae.b_dec)]
        return decode_groups(acts, sae.W_dec, sae.b_dec, self.encoded.ends)

    @cached_property
    def error_BD(self) -> Tensor:
        """x − x̂."""
        return self.x_BD - self.prefixes[-1]


def reconstruction(forward: Forward, weights: tuple[float, ...] = (1.0,)) -> Tensor:
    """Mean over tokens of ‖x − x̂‖², summed over prefixes with weights (Bussmann et al. 2025, arXiv 2503.17547)."""
    errors = [
        weight * (forward.x_BD - x_hat_BD).square().sum(1).mean()
        for weight, x_hat_BD in zip(weights, forward.prefixes, strict=True)
    ]
    return reduce(torch.add, errors)


def aux_k(forward: Forward, k: int, *, signed: bool = False) -> Tensor:
    """The residual's FVU when the top `k` dead latents a token reconstruct it (Gao et al. 2024, arXiv 2406.04093).

    The residual is data here; the gradient reaches the dead latents' encoder and decoder rows and no other. With
    `signed` they are the top in absolute value, with their sign.
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
    """Mean over tokens of Σ f_i, or of Σ f_i·‖d_i‖ for decoders whose norms are free."""
    values, tokens = _values(acts)
    if norms_F is not None:
        values = values * (norms_F[acts.support.latents_N] if isinstance(acts, Codes) else norms_F)
    return values.sum() / tokens


def lp(acts: Acts, p: float, floor: float = 1e-6) -> Tensor:
    """Mean over tokens of Σ f_iᵖ (Karvonen et al. 2024, arXiv 2408.00113).

    Below `floor` an activation counts as 0 and has no gradient; fᵖ has an unbounded one there.
    """
    values, tokens = _values(acts)
    active = values > floor
    return values.masked_fill(~active, 1.0).pow(p).masked_fill(~active, 0.0).sum() / tokens


def _values(acts: Acts) -> tuple[Tensor, int]:
    """The activations in either form, and the number of tokens."""
    return (acts.values_N, acts.support.batch) if isinstance(acts, Codes) else (acts, len(acts))


def gate_reconstruction(forward: Forward) -> Tensor:
    """Mean ‖x − x̂‖² of what the gate alone would reconstruct; the decoder is held still (arXiv 2404.16014)."""
    assert forward.encoded.gate is not None
    x_hat_BD = decode(forward.encoded.gate, forward.sae.W_dec.detach(), forward.sae.b_dec.detach())
    return (forward.x_BD - x_hat_BD).square().sum(1).mean()


def orthogonality(W_dec_FD: Tensor, neighbors_F: Tensor, cosine_F: Tensor | None = None) -> Tensor:
    """Mean over latents of relu(max cos)² (OrtSAE, Korznikov et al. 2025, arXiv 2509.22033)."""
    return F.relu(pair_cosines(W_dec_FD, neighbors_F, cosine_F)).square().mean()
