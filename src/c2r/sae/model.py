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
    """Parameters that only some architectures have; None for the others."""

    threshold: Tensor | None = None
    """jumprelu: `[F]`."""
    r_mag: Tensor | None = None
    """gated: logarithm of the scale of the magnitude relative to the gate, `[F]`."""
    b_mag: Tensor | None = None
    """gated: bias of the magnitude `[F]`; that of the gate is `b_enc`."""
    k: int | None = None
    """topk, abs_topk: active latents per token."""
    rank: Tensor | None = None
    """topk, abs_topk, optional: positive factors `[F]`. The k latents are selected by pre-activation times factor, so
    that folding decoder norms does not change the selection. None: by the pre-activations themselves."""


EXTRAS: dict[str, set[str]] = {
    "standard": set(),
    "jumprelu": {"threshold"},
    "topk": {"k"},
    "abs_topk": {"k"},
    "gated": {"r_mag", "b_mag"},
}
"""The fields of `Extra` that each architecture requires; those with `k` may also have `rank`."""
_ZERO_NORM, _ROUNDING = 1e-30, 1e-6
"""Decoder rows shorter than the first are treated as zero, those with a norm within the second of 1 as unit rows."""


class SAE(nn.Module):
    """An SAE in its inference form. Row i of `W_enc [F, D]` and of `W_dec [F, D]` belongs to latent i.

    Inputs may have any floating-point dtype. Computation uses the weights' dtype, even inside `torch.autocast`:
    activations f are returned in that dtype, and x̂ = sae(x) in the dtype of x. `sae.to(torch.bfloat16)` computes in
    half precision.

    Arguments:
        architecture: σ. "standard" is ReLU; "jumprelu" keeps pre-activations above `threshold` (also the inference form
            of batch-top-k); "topk" keeps the `k` largest positive ones per token; "abs_topk" the `k` with the largest
            absolute value, including their sign; "gated" has a gate, (x − b_dec)·W_enc + b_enc > 0, and a magnitude
            from the same product times exp(r_mag) (Rajamanoharan et al. 2024, arXiv 2404.16014).
        extra: parameters that only this architecture has.
        subtract_b_dec: whether the encoder reads x − b_dec instead of x.
        config: content of the `cfg.json` from which the SAE was loaded.

    Raises:
        ValueError: `extra` lacks a field for the architecture, or has one too many.
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
        if given - ({"rank"} if "k" in given else set()) != EXTRAS[architecture]:
            raise ValueError(
                f"extra: got {given or '{}'}; architecture {architecture!r} requires {EXTRAS[architecture] or '{}'}"
            )
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.threshold, self.r_mag, self.b_mag, self.rank = (
            None if tensor is None else nn.Parameter(tensor)
            for tensor in (extra.threshold, extra.r_mag, extra.b_mag, extra.rank)
        )
        self.architecture: Architecture = architecture
        self.k, self.subtract_b_dec, self.config = extra.k, subtract_b_dec, config or {}
        self.given_norms_F: Tensor | None = None
        """Norms of the decoder's rows before they were folded into the activations; None if they were not folded."""

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
        """Parameters that only this architecture has."""
        return Extra(self.threshold, self.r_mag, self.b_mag, self.k, self.rank)

    def centred(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The encoder's input: x − b_dec, or x if `subtract_b_dec` is false."""
        return x - self.b_dec if self.subtract_b_dec else x

    def pre_activations(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """Pre-activations, to which σ is applied; for "gated" those of the gate.

        Raises:
            ValueError: x is not floating-point, or its width is not D.
        """
        if not x.is_floating_point() or x.shape[-1] != self.d_in:
            raise ValueError(
                f"activations: got {x.dtype} {list(x.shape)}; expected floating-point numbers [..., {self.d_in}]"
            )
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.centred(x.to(self.W_enc.dtype)), self.W_enc, self.b_enc)

    def activate(self, pre: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
        """σ of pre-activations."""
        if self.threshold is not None:
            return F.relu(pre) * (pre > self.threshold)
        if self.r_mag is not None and self.b_mag is not None:
            magnitude = self.r_mag.exp() * (pre - self.b_enc) + self.b_mag
            return F.relu(magnitude) * (pre > 0)
        if self.k is not None:
            ranked = pre if self.rank is None else pre * self.rank
            strength = ranked.abs() if self.architecture == "abs_topk" else F.relu(ranked)
            best = strength.topk(self.k, dim=-1).indices
            kept = pre.gather(-1, best)
            return torch.zeros_like(pre).scatter(-1, best, kept if self.architecture == "abs_topk" else F.relu(kept))
        return F.relu(pre)

    def encode(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """Activations f of x. Pass x as the language model outputs it: any scaling of training is folded into the SAE.

        Raises:
            ValueError: x is not floating-point or has another width; or x, the weights or the result contain NaN or
                infinity, which would look like firing latents.
        """
        pre = self.pre_activations(x)
        acts = self.activate(pre)
        # σ can turn infinity into 0, and the magnitude of "gated" can overflow although the gate is finite: check both.
        if not (_all_finite(pre) and (self.r_mag is None or _all_finite(acts))):
            raise ValueError(self._not_finite(x, acts))
        return acts

    def decode(self, acts: Float[Tensor, "*B F"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of activations f."""
        with torch.autocast(acts.device.type, enabled=False):
            return acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of x, in the dtype of x."""
        return self.decode(self.encode(x)).to(x.dtype)

    @torch.no_grad()
    def with_unit_rows(self) -> SAE:
        """An equivalent SAE with unit decoder rows: activations, thresholds and biases are multiplied by the norms.

        Exact up to rounding for every architecture; if the k largest are selected, `rank` preserves the selection. Zero
        rows are unchanged. The result's `given_norms_F` are the original norms. If all rows already have unit norm, the
        SAE itself is returned.
        """
        norm_F = row_norms(self.W_dec)
        norm_F = torch.where((norm_F < _ZERO_NORM) | ((norm_F - 1).abs() < _ROUNDING), 1.0, norm_F)
        if bool((norm_F == 1).all()):
            return self
        folded = self._scaled(norm_F)
        folded.given_norms_F = row_norms(self.W_dec).to(self.W_dec.dtype)
        return folded

    @torch.no_grad()
    def with_plain_ranking(self) -> SAE:
        """An equivalent SAE without `rank`, for formats that lack it; its decoder rows have other norms."""
        return self if self.rank is None else self._scaled(self.rank.double())

    def _scaled(self, by_F: Tensor) -> SAE:
        """An equivalent SAE with activations multiplied, and decoder rows divided, by `by_F` (positive fp64)."""

        def times(tensor: Tensor | None, power: int = 1) -> Tensor | None:
            if tensor is None:
                return None
            return (tensor * by_F.pow(power).to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))).detach()

        rank: Tensor | None = None
        if self.k is not None:
            rank_F = (1.0 if self.rank is None else self.rank.double()) / by_F
            if bool((rank_F - rank_F[0]).abs().max() > _ROUNDING * rank_F[0]):  # equal factors do not change the order
                rank = (rank_F / rank_F.max()).to(self.W_enc.dtype)
        W_enc, b_enc, W_dec = times(self.W_enc), times(self.b_enc), times(self.W_dec, -1)
        assert W_enc is not None
        assert b_enc is not None
        assert W_dec is not None
        r_mag = None if self.r_mag is None else self.r_mag.detach().clone()
        scaled = SAE(
            W_enc, b_enc, W_dec, self.b_dec.detach().clone(), architecture=self.architecture,
            extra=Extra(times(self.threshold), r_mag, times(self.b_mag), self.k, rank),
            subtract_b_dec=self.subtract_b_dec, config=self.config,
        )  # fmt: skip
        return scaled.requires_grad_(self.W_dec.requires_grad)

    def _not_finite(self, x: Tensor, acts: Tensor) -> str:
        """An error message that says why activations are not finite."""
        for what, tensor in (("activations of the model", x), *self.named_parameters()):
            if not _all_finite(tensor):
                return f"{what}: {count_not_finite(tensor)}"
        return f"activations of latents: {count_not_finite(acts)}; finite inputs overflowed {acts.dtype}"


def row_norms(W_FD: Tensor) -> Tensor:
    """Norms of rows `[F]` in fp64, in which long rows do not overflow and short ones do not round to 0."""
    return torch.linalg.vector_norm(W_FD.detach(), dim=1, dtype=torch.float64)


def count_not_finite(tensor: Tensor) -> str:
    """A phrase that says how many numbers of a tensor are NaN or infinite."""
    return f"{int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} numbers are NaN or infinite"


def _all_finite(tensor: Tensor) -> bool:
    # The sum is cheap and is finite only if all numbers are; since large finite numbers can overflow it, check twice.
    return bool(tensor.detach().sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def rescaled(sae: SAE, scale: float, architecture: Any, extra: Extra) -> SAE:
    """A copy that maps scale·x to scale·x̂ if `sae` maps x to x̂: biases and thresholds are scaled, weights are not."""

    def grown(tensor: Tensor | None, by: float) -> Tensor | None:
        return None if tensor is None else (tensor * by).detach().clone()

    extra = extra._replace(
        threshold=grown(extra.threshold, scale), r_mag=grown(extra.r_mag, 1.0), b_mag=grown(extra.b_mag, scale),
        rank=grown(extra.rank, 1.0),
    )  # fmt: skip
    rows = [sae.W_enc, sae.b_enc * scale, sae.W_dec, sae.b_dec * scale]
    return SAE(
        *(row.detach().clone() for row in rows), architecture=architecture, extra=extra,
        subtract_b_dec=sae.subtract_b_dec,
    )  # fmt: skip
