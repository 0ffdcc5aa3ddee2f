"""Terms of the training objectives: pure functions of one forward pass, each a scalar.

B tokens in a batch · D width of the activations · F latents · Z dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.codes import Acts


@dataclass(frozen=True)
class Forward:
    """What one forward pass leaves for the terms."""

    x_BD: Tensor
    acts: Acts
    x_hat_BD: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    dead_F: Tensor
    """Latents that have been silent for too long, bool."""

    @cached_property
    def error_BD(self) -> Tensor:
        """x − x̂."""
        return self.x_BD - self.x_hat_BD


def reconstruction(forward: Forward) -> Tensor:
    """Mean over tokens of ‖x − x̂‖²."""
    return forward.error_BD.square().sum(1).mean()


def aux_k(forward: Forward, k: int) -> Tensor:
    """The residual's FVU when the top `k` dead latents a token reconstruct it (Gao et al. 2024, arXiv 2406.04093).

    The residual is data here; the gradient reaches the dead latents' encoder and decoder rows and no other.
    """
    dead_Z = forward.dead_F.nonzero().squeeze(1)
    if len(dead_Z) == 0:
        return forward.x_BD.new_zeros(())
    residual_BD = forward.error_BD.detach()
    centred_BD = forward.x_BD - forward.b_dec_D
    acts_BZ = F.relu(F.linear(centred_BD, forward.W_enc_FD[dead_Z], forward.b_enc_F[dead_Z]))
    if k < len(dead_Z):
        best = acts_BZ.topk(k, dim=1, sorted=False)
        acts_BZ = torch.zeros_like(acts_BZ).scatter(1, best.indices, best.values)
    missed = (residual_BD - acts_BZ @ forward.W_dec_FD[dead_Z]).square().sum(1).mean()
    variance = (residual_BD - residual_BD.mean(0)).square().sum(1).mean()
    return (missed / variance).nan_to_num(0.0)
