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
    """topk, abs_topk: active latents per token."""
    rank: Tensor | None = None
    """topk, abs_topk, optional: positive factors `[F]`. The k latents are chosen by pre-activation times factor, which
    keeps the choice what it was when decoder norms are folded. None: by the pre-activations themselves."""


EXTRAS: dict[str, set[str]] = {
    "standard": set(),
    "jumprelu": {"threshold"},
    "topk": {"k"},
    "abs_topk": {"k"},
    "gated": {"r_mag", "b_mag"},
}
"""Which of `Extra` each architecture has; those with `k` may have `rank` too."""
_ZERO_NORM, _ROUNDING = 1e-30, 1e-6
"""A decoder row shorter than the first has no direction; one whose norm is within the second of 1 has norm 1."""


class SAE(nn.Module):
    """An SAE in its inference form. Row i of `W_enc [F, D]` and of `W_dec [F, D]` belongs to latent i.

    Activations of any floating-point type are accepted. Computation is in the weights' type, also inside a caller's
    autocast: activations f are returned in it, and x̂ = sae(x) in the type of x. `sae.to(torch.bfloat16)` computes in
    half precision.

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
        if given - ({"rank"} if "k" in given else set()) != EXTRAS[architecture]:
            raise ValueError(f"extra: architecture {architecture!r} needs {EXTRAS[architecture] or '{}'}, got {given}")
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.threshold, self.r_mag, self.b_mag, self.rank = (
            None if tensor is None else nn.Parameter(tensor)
            for tensor in (extra.threshold, extra.r_mag, extra.b_mag, extra.rank)
        )
        self.architecture: Architecture = architecture
        self.k, self.subtract_b_dec, self.config = extra.k, subtract_b_dec, config or {}
        self.given_norms_F: Tensor | None = None
        """Norms that the decoder's rows had before they were folded; None: they were not."""

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
        return Extra(self.threshold, self.r_mag, self.b_mag, self.k, self.rank)

    def centred(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What enters the encoder."""
        return x - self.b_dec if self.subtract_b_dec else x

    def pre_activations(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """What σ is applied to; for "gated" the gate's.

        Raises:
            ValueError: x is not floating-point, or of another width than D.
        """
        if not x.is_floating_point() or x.shape[-1] != self.d_in:
            raise ValueError(
                f"activations: got {x.dtype} {list(x.shape)}; accepted are floating-point numbers [..., {self.d_in}]"
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
        """Activations f of x, which comes as the language model gives it: scaling is folded in.

        Raises:
            ValueError: x is not floating-point or of another width; or there is NaN or infinity in x, in the weights,
                or in what they make of x. Such numbers would pass for firing.
        """
        pre = self.pre_activations(x)
        acts = self.activate(pre)
        # Infinity can become 0 in σ, and the gate's magnitude can overflow behind a finite gate: both are looked at.
        if not (_all_finite(pre) and (self.r_mag is None or _all_finite(acts))):
            raise ValueError(self._not_finite(x, acts))
        return acts

    def decode(self, acts: Float[Tensor, "*B F"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of activations f."""
        with torch.autocast(acts.device.type, enabled=False):
            return acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Reconstruction x̂ of x, in the type of x."""
        return self.decode(self.encode(x)).to(x.dtype)

    @torch.no_grad()
    def with_unit_rows(self) -> SAE:
        """The same function with decoder rows of norm 1: activations and what they are compared with grow by the norm.

        Exact but for rounding, for every architecture: where the k largest are chosen, `rank` keeps the choice. A row
        of zeros, which has no direction, stays as it is. `given_norms_F` of the result are the norms before. Where all
        rows are of unit norm already, this is the SAE itself.
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
        """The same function without `rank`, for formats that have none; decoder rows then have other norms."""
        return self if self.rank is None else self._scaled(self.rank.double())

    def _scaled(self, by_F: Tensor) -> SAE:
        """The same function with activations `by_F` times as large, positive fp64, and decoder rows as much less."""

        def times(tensor: Tensor | None, power: int = 1) -> Tensor | None:
            if tensor is None:
                return None
            return (tensor * by_F.pow(power).to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))).detach()

        rank: Tensor | None = None
        if self.k is not None:
            rank_F = (1.0 if self.rank is None else self.rank.double()) / by_F
            if bool((rank_F - rank_F[0]).abs().max() > _ROUNDING * rank_F[0]):  # equal factors change no order
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
        """Whose fault it is that activations are not finite."""
        for what, tensor in (("activations of the model", x), *self.named_parameters()):
            if not _all_finite(tensor):
                return f"{what}: {count_not_finite(tensor)}"
        return f"activations of latents: {count_not_finite(acts)}; finite numbers have overflown {acts.dtype}"


def row_norms(W_FD: Tensor) -> Tensor:
    """‖row‖ in fp64 `[F]`, which neither overflows nor rounds short rows to 0."""
    return torch.linalg.vector_norm(W_FD.detach(), dim=1, dtype=torch.float64)


def count_not_finite(tensor: Tensor) -> str:
    """How many of a tensor's numbers are NaN or infinite, in words."""
    return f"{int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} numbers are NaN or infinite"


def _all_finite(tensor: Tensor) -> bool:
    # The sum is cheap, and finite only where all are; large finite numbers can overflow it.
    return bool(tensor.detach().sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def rescaled(sae: SAE, scale: float, architecture: Any, extra: Extra) -> SAE:
    """A copy that does on scale·x what `sae` does on x: biases and thresholds grow, weights stay."""

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
