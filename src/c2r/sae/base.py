"""A trained sparse autoencoder: f = σ(W_enc·(x − b_dec) + b_enc), x̂ = f·W_dec + b_dec.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Architecture = Literal["standard", "jumprelu", "topk"]


class SAE(nn.Module):
    """An SAE in its inference form. Row i of `W_enc [F, D]` and of `W_dec [F, D]` belongs to latent i.

    Arguments:
        architecture: σ. "standard" is ReLU; "jumprelu" keeps pre-activations above `threshold [F]` (what
            batch-top-k training leaves behind); "topk" keeps the `k` largest positive ones a token.
        subtract_b_dec: whether x − b_dec or x enters the encoder.
        config: the `cfg.json` it was read from.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "F D"],
        b_enc: Float[Tensor, " F"],
        W_dec: Float[Tensor, "F D"],
        b_dec: Float[Tensor, " D"],
        *,
        architecture: Architecture,
        threshold: Float[Tensor, " F"] | None = None,
        k: int | None = None,
        subtract_b_dec: bool = True,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (threshold is None) == (architecture == "jumprelu"):
            raise ValueError(f"threshold: architecture {architecture!r} got {threshold}; only jumprelu has one")
        if (k is None) == (architecture == "topk"):
            raise ValueError(f"k: architecture {architecture!r} got {k}; only topk has one")
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.threshold = None if threshold is None else nn.Parameter(threshold)
        self.architecture, self.k, self.subtract_b_dec = architecture, k, subtract_b_dec
        self.config = config or {}

    @property
    def width(self) -> int:
        """F, the number of latents."""
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        """D, the width of the activations."""
        return self.W_dec.shape[1]

    def pre_activations(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """What σ is applied to."""
        return F.linear(x - self.b_dec if self.subtract_b_dec else x, self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """Activations f ≥ 0 of x, which comes as the language model gives it: scaling is folded in."""
        pre = self.pre_activations(x)
        if self.architecture == "jumprelu":
            assert self.threshold is not None
            return F.relu(pre) * (pre > self.threshold)
        if self.architecture == "topk":
            best = pre.topk(int(self.k or 0), dim=-1)
            return torch.zeros_like(pre).scatter(-1, best.indices, F.relu(best.values))
        return F.relu(pre)

    def decode(self, acts: Float[Tensor, "*B F"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of activations f."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of x."""
        return self.decode(self.encode(x))
