"""A sparse autoencoder: f = σ(W_enc·(x − b_dec) + b_enc), x̂ = f·W_dec + b_dec.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Architecture = Literal["standard", "jumprelu", "topk", "abs_topk", "gated"]


class Extra(NamedTuple):
    """What some architectures have besides weights and biases, each None elsewhere."""

    threshold: Tensor | None = None
    """jumprelu: `[F]`."""
    r_mag: Tensor | None = None
    """gated: logarithm of the magnitude's scale over the gate's, `[F]`."""
    b_mag: Tensor | None = None
    """gated: bias of the magnitude `[F]`; the gate's is `b_enc`."""
    k: int | None = None
    """topk, abs_topk: active latents a token."""


EXTRAS: dict[str, set[str]] = {
    "standard": set(),
    "jumprelu": {"threshold"},
    "topk": {"k"},
    "abs_topk": {"k"},
    "gated": {"r_mag", "b_mag"},
}
"""Which of `Extra` each architecture has."""


class SAE(nn.Module):
    """An SAE in its inference form. Row i of `W_enc [F, D]` and of `W_dec [F, D]` belongs to latent i.

    Arguments:
        architecture: σ. "standard" is ReLU; "jumprelu" keeps pre-activations above `threshold` (what batch-top-k
            training leaves behind); "topk" keeps the `k` largest positive ones a token; "abs_topk" the `k` of
            largest absolute value, with their sign; "gated" lets a gate, (x − b_dec)·W_enc + b_enc > 0, decide, and
            scales the shared product by exp(r_mag) for the magnitude (Rajamanoharan et al. 2024, arXiv 2404.16014).
        extra: what the architecture has besides.
        subtract_b_dec: whether x − b_dec or x enters the encoder.
        config: the `cfg.json` it was read from.

    Raises:
        ValueError: `extra` has too little or too much for the architecture.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "F D"],
        b_enc: Float[Tensor, " F"],
        W_dec: Float[Tensor, "F D"],
        b_dec: Float[Tensor, " D"],
        *,
        architecture: Architecture,
        extra: Extra = Extra(),  # noqa: B008 (immutable)
        subtract_b_dec: bool = True,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        given = {name for name, value in extra._asdict().items() if value is not None}
        if given != EXTRAS[architecture]:
            raise ValueError(f"extra: architecture {architecture!r} needs {EXTRAS[architecture] or '{}'}, got {given}")
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.threshold, self.r_mag, self.b_mag = (
            None if tensor is None else nn.Parameter(tensor) for tensor in (extra.threshold, extra.r_mag, extra.b_mag)
        )
        self.architecture: Architecture = architecture
        self.k, self.subtract_b_dec, self.config = extra.k, subtract_b_dec, config or {}

    @property
    def width(self) -> int:
        """F, the number of latents."""
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        """D, the width of the activations."""
        return self.W_dec.shape[1]

    @property
    def extra(self) -> Extra:
        """What this architecture has besides weights and biases."""
        return Extra(self.threshold, self.r_mag, self.b_mag, self.k)

    def centred(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What enters the encoder."""
        return x - self.b_dec if self.subtract_b_dec else x

    def pre_activations(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """What σ is applied to; for "gated" the gate's."""
        return F.linear(self.centred(x), self.W_enc, self.b_enc)

    def activate(self, pre: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
        """σ of pre-activations."""
        if self.threshold is not None:
            return F.relu(pre) * (pre > self.threshold)
        if self.r_mag is not None and self.b_mag is not None:
            magnitude = self.r_mag.exp() * (pre - self.b_enc) + self.b_mag
            return F.relu(magnitude) * (pre > 0)
        if self.k is not None:
            strength = pre.abs() if self.architecture == "abs_topk" else F.relu(pre)
            best = strength.topk(self.k, dim=-1).indices
            kept = pre.gather(-1, best)
            return torch.zeros_like(pre).scatter(-1, best, kept if self.architecture == "abs_topk" else F.relu(kept))
        return F.relu(pre)

    def encode(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """Activations f of x, which comes as the language model gives it: scaling is folded in."""
        return self.activate(self.pre_activations(x))

    def decode(self, acts: Float[Tensor, "*B F"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of activations f."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of x."""
        return self.decode(self.encode(x))
