"""Pre-activations in training: a product in the run's precision, and fp32 values of selected entries.

B tokens in a batch · D width of the activations · F latents · N selected entries in a batch.
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
        sae: the SAE; its current weights are used in each call.
        dtype: dtype of the products; selected values and gradients are always fp32.
        int8: whether batch-top-k may use an int8 product to find candidates.
    """

    def __init__(self, sae: SAE, dtype: torch.dtype, *, int8: bool = False) -> None:
        self.sae, self.dtype, self.int8 = sae, dtype, int8

    def dense(self, x_BD: Tensor) -> Tensor:
        """Pre-activations `[B, F]` multiplied in `dtype`; their gradient is fp32."""
        sae = self.sae
        return encode_all(x_BD, sae.W_enc, sae.b_enc, sae.b_dec if sae.subtract_b_dec else None, self.dtype)

    @torch.no_grad()
    def scores(self, x_BD: Tensor) -> Tensor:
        """(x − b_dec)·W_enc `[B, F]` in `dtype`, for selection; the transpose of a contiguous matrix.

        The bias is not added, because that would take a tenth of the product's time on a CPU.
        """
        sae = self.sae
        return F.linear(sae.W_enc.to(self.dtype), sae.centred(x_BD).to(self.dtype)).T

    @torch.no_grad()
    def scores_by_token(self, x_BD: Tensor) -> Tensor:
        """Pre-activations `[B, F]` in `dtype`, contiguous, for selection per token."""
        sae, low = self.sae, self.dtype
        return F.linear(sae.centred(x_BD).to(low), sae.W_enc.to(low), sae.b_enc.to(low))

    def at(self, x_BD: Tensor, support: Support, values_N: Tensor | None = None) -> Tensor:
        """Pre-activations `[N]` at `support` in fp32, differentiable; pass `values_N` if they are already known."""
        sae = self.sae
        return encode_at(support, x_BD, sae.W_enc, sae.b_enc, sae.b_dec if sae.subtract_b_dec else None, values_N)
