"""Pre-activations while training: a product in the run's precision, and exact values where they are needed.

B tokens in a batch · D width of the activations · F latents · N chosen places in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.kernels.codes import Support, encode_all, encode_at
from c2r.sae.model import SAE


class Encoder:
    """The encoder of an SAE in training.

    Arguments:
        sae: its weights are read anew on each call.
        dtype: of the products; chosen values and gradients are fp32 either way.
        int8: whether batch-top-k may look for candidates by a product in int8.
    """

    def __init__(self, sae: SAE, dtype: torch.dtype, *, int8: bool = False) -> None:
        self.sae, self.dtype, self.int8 = sae, dtype, int8

    def dense(self, x_BD: Tensor) -> Tensor:
        """Pre-activations `[B, F]` multiplied in `dtype`; their gradient is fp32."""
        sae = self.sae
        return encode_all(x_BD, sae.W_enc, sae.b_enc, sae.b_dec if sae.subtract_b_dec else None, self.dtype)

    @torch.no_grad()
    def scores(self, x_BD: Tensor) -> Tensor:
        """(x − b_dec)·W_enc `[B, F]` in `dtype`, to select by; the transpose of a contiguous matrix.

        Without the bias, which would cost a tenth of the product on a CPU.
        """
        sae = self.sae
        return F.linear(sae.W_enc.to(self.dtype), sae.centred(x_BD).to(self.dtype)).T

    @torch.no_grad()
    def scores_by_token(self, x_BD: Tensor) -> Tensor:
        """Pre-activations `[B, F]` in `dtype`, each token's contiguous, to select per token."""
        sae, low = self.sae, self.dtype
        return F.linear(sae.centred(x_BD).to(low), sae.W_enc.to(low), sae.b_enc.to(low))

    def at(self, x_BD: Tensor, support: Support, values_N: Tensor | None = None) -> Tensor:
        """Pre-activations `[N]` at `support` in fp32, with their gradient; pass `values_N` if they are known."""
        sae = self.sae
        return encode_at(support, x_BD, sae.W_enc, sae.b_enc, sae.b_dec if sae.subtract_b_dec else None, values_N)
