"""Sparse activations and their products: encode, decode and both weight gradients, computed from N non-zeros.

Activations have one of two forms, dense `[B, F]` or `Codes`; `norms`, `decode`, `l0` and `to_dense` accept both. The
non-zeros of a batch are sorted by latent once per step; encode and all backward passes share the result. No tensor of
size B×F or N×D is kept.

B tokens in a batch · D width of the activations · F latents · N non-zeros in a batch · R latents of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.kernels.rows import gather_sum, row_dots, row_starts, weighted_sum


class ByLatent(NamedTuple):
    """The non-zeros of a batch, sorted by latent and then by token."""

    order_N: Tensor
    """Index of each non-zero in the support."""
    tokens_N: Tensor
    starts: Tensor
    """`[F + 1]`: the non-zeros of latent i are those from starts[i] to starts[i + 1]."""


@dataclass(frozen=True)
class Support:
    """Positions of the non-zeros of a batch, sorted by token."""

    latents_N: Tensor
    """Latent of each non-zero, int64, grouped by token."""
    tokens_N: Tensor
    """Token of each non-zero, int64, ascending."""
    batch: int
    """B."""
    width: int
    """F."""

    @cached_property
    def token_starts(self) -> Tensor:
        """`[B + 1]`: the non-zeros of token b are those from token_starts[b] to token_starts[b + 1]."""
        return row_starts(self.tokens_N, self.batch)

    @cached_property
    def by_latent(self) -> ByLatent:
        """The same non-zeros, grouped by latent."""
        latents_N, order_N = self.latents_N.sort(stable=True)
        return ByLatent(order_N, self.tokens_N[order_N], row_starts(latents_N, self.width))


@dataclass(frozen=True)
class Codes:
    """Sparse activations of a batch: `values_N` at the positions `support`."""

    values_N: Tensor
    support: Support

    @property
    def width(self) -> int:
        """F, the number of latents."""
        return self.support.width


Acts = Tensor | Codes


def from_dense(acts_BF: Tensor) -> Codes:
    """The non-zeros of dense activations; differentiable."""
    tokens, latents = acts_BF.nonzero(as_tuple=True)
    support = Support(latents, tokens, *acts_BF.shape)
    return Codes(acts_BF[tokens, latents], support)


def to_dense(acts: Acts) -> Tensor:
    """Dense activations `[B, F]`."""
    if isinstance(acts, Tensor):
        return acts
    at = acts.support
    return acts.values_N.new_zeros(at.batch, at.width).index_put((at.tokens_N, at.latents_N), acts.values_N)


def join(parts: Sequence[Codes]) -> Codes:
    """Concatenate batches of the same latents."""
    starts = itertools.accumulate((part.support.batch for part in parts), initial=0)
    tokens_N = torch.cat([part.support.tokens_N + start for part, start in zip(parts, starts, strict=False)])
    latents_N = torch.cat([part.support.latents_N for part in parts])
    support = Support(latents_N, tokens_N, sum(part.support.batch for part in parts), parts[0].width)
    return Codes(torch.cat([part.values_N for part in parts]), support)


def take(codes: Codes, tokens_B: Tensor) -> Codes:
    """The activations of the tokens with indices `tokens_B`, in that order."""
    starts = codes.support.token_starts
    counts_B = starts[tokens_B + 1] - starts[tokens_B]
    rows_N = torch.arange(len(tokens_B), device=counts_B.device).repeat_interleave(counts_B)
    first_B = counts_B.cumsum(0) - counts_B
    at_N = starts[tokens_B][rows_N] + torch.arange(len(rows_N), device=counts_B.device) - first_B[rows_N]
    return Codes(codes.values_N[at_N], Support(codes.support.latents_N[at_N], rows_N, len(tokens_B), codes.width))


def norms(acts: Acts) -> Tensor:
    """‖f_i‖₂ of each latent over the batch, `[F]`, in at least fp32; the gradient is 0 for silent latents."""
    if isinstance(acts, Tensor):
        square_F = at_least_fp32(acts).square().sum(0)
    else:
        square_N = at_least_fp32(acts.values_N).square()
        square_F = square_N.new_zeros(acts.width).index_add(0, acts.support.latents_N, square_N)
    silent_F = square_F == 0
    return square_F.masked_fill(silent_F, 1.0).sqrt().masked_fill(silent_F, 0.0)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Convert half precision to fp32, because a sum of squares over a batch would overflow or vanish."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def l0(acts: Acts) -> Tensor:
    """Mean number of active latents per token, a scalar."""
    if isinstance(acts, Tensor):
        return (acts != 0).sum() / acts.shape[0]
    return (acts.values_N != 0).sum() / acts.support.batch


def fired(acts: Acts) -> Tensor:
    """Bool `[F]`: which latents are active on any token of the batch."""
    if isinstance(acts, Tensor):
        return (acts != 0).any(0)
    fired_F = torch.zeros(acts.width, dtype=torch.bool, device=acts.values_N.device)
    fired_F[acts.support.latents_N[acts.values_N != 0]] = True
    return fired_F


def decode(acts: Acts, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
    """x̂ = f·W_dec + b_dec, `[B, D]`."""
    if isinstance(acts, Tensor):
        return acts @ W_dec_FD + b_dec_D
    product: Any = _Decode.apply(acts.values_N, W_dec_FD, acts.support)
    return product + b_dec_D


def decode_groups(acts: Acts, W_dec_FD: Tensor, b_dec_D: Tensor, ends: tuple[int, ...]) -> list[Tensor]:
    """Reconstructions `[B, D]` from the first `end` latents for each of `ends`, each computed from the previous one."""
    starts = (0, *ends[:-1])
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    # `split`, not slices: its backward concatenates the gradients, while each slice's allocates F×D zeros.
    rows = W_dec_FD.split([*sizes, len(W_dec_FD) - ends[-1]])
    prefixes, x_hat_BD, zeros_D = [], b_dec_D, torch.zeros_like(b_dec_D)
    for start, end, rows_RD in zip(starts, ends, rows, strict=False):
        x_hat_BD = x_hat_BD + decode(_slice(acts, start, end), rows_RD, zeros_D)
        prefixes.append(x_hat_BD)
    return prefixes


def _slice(acts: Acts, start: int, end: int) -> Acts:
    """The activations of latents `start` to `end`."""
    if isinstance(acts, Tensor):
        return acts[:, start:end]
    at = acts.support
    inside_N = (at.latents_N >= start) & (at.latents_N < end)
    support = Support(at.latents_N[inside_N] - start, at.tokens_N[inside_N], at.batch, end - start)
    return Codes(acts.values_N[inside_N], support)


def encode_at(
    support: Support,
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_dec_D: Tensor | None,
    values_N: Tensor | None = None,
) -> Tensor:
    """Pre-activations (x − b_dec)·W_enc + b_enc only at `support`, `[N]`, in the precision of the weights.

    `x_BD` is data and gets no gradient. `b_dec_D` is None for an encoder that does not subtract it. If the result is
    already known, pass it as `values_N`.
    """
    of_support_N: Any = _Encode.apply(x_BD, W_enc_FD, b_enc_F, b_dec_D, support, values_N)
    return of_support_N


def encode_all(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Pre-activations (x − b_dec)·W_enc + b_enc `[B, F]`, multiplied in `dtype`; gradients have the weights' dtype.

    `x_BD` is data and gets no gradient. `b_dec_D` is None for an encoder that does not subtract it.
    """
    pre_BF: Any = _EncodeAll.apply(x_BD, W_enc_FD, b_enc_F, b_dec_D, dtype)
    return pre_BF


def _dots_at(support: Support, rows_BD: Tensor, weights_FD: Tensor) -> Tensor:
    """rows[token_n] · weights[latent_n], `[N]`, computed latent by latent, so that each weight is loaded only once."""
    at = support.by_latent
    dots_N = row_dots(weights_FD, rows_BD, at.tokens_N, at.starts)
    return torch.empty_like(dots_N).index_copy_(0, at.order_N, dots_N)


def _weight_gradient(rows_BD: Tensor, weight_N: Tensor, support: Support) -> Tensor:
    """Σ weight_n · rows[token_n] over the non-zeros n of each latent, `[F, D]`."""
    at = support.by_latent
    return gather_sum(rows_BD.contiguous(), at.tokens_N, at.starts, weight_N[at.order_N])


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_N: Tensor, W_dec_FD: Tensor, support: Support) -> Tensor:
        ctx.save_for_backward(values_N, W_dec_FD)
        ctx.support = support
        return gather_sum(W_dec_FD, support.latents_N, support.token_starts, values_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BD,) = grads
        values_N, W_dec_FD = ctx.saved_tensors
        at = ctx.support
        grad_values = _dots_at(at, grad_BD, W_dec_FD) if ctx.needs_input_grad[0] else None
        grad_W_dec = _weight_gradient(grad_BD, values_N, at) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W_dec, None


class _EncodeAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        centred_BD = x_BD if b_dec_D is None else x_BD - b_dec_D
        ctx.save_for_backward(centred_BD, W_enc_FD)
        return F.linear(centred_BD.to(dtype), W_enc_FD.to(dtype)).to(W_enc_FD.dtype) + b_enc_F

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BF,) = grads
        centred_BD, W_enc_FD = ctx.saved_tensors
        with torch.autocast(grad_BF.device.type, enabled=False):
            grad_b_enc = grad_BF.sum(0)
            # All tokens subtract the same b_dec, so its gradient depends only on sums over tokens.
            grad_b_dec = -weighted_sum(W_enc_FD, grad_b_enc) if ctx.needs_input_grad[3] else None
            return None, grad_BF.T @ centred_BD, grad_b_enc, grad_b_dec, None


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_dec_D: Tensor | None,
        support: Support,
        values_N: Tensor | None,
    ) -> Tensor:
        centred_BD = x_BD if b_dec_D is None else x_BD - b_dec_D
        ctx.save_for_backward(centred_BD, W_enc_FD)
        ctx.support = support
        if values_N is not None:
            return values_N.view_as(values_N)
        return _dots_at(support, centred_BD, W_enc_FD) + b_enc_F[support.latents_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        centred_BD, W_enc_FD = ctx.saved_tensors
        grad_W_enc = _weight_gradient(centred_BD, grad_N, ctx.support)
        grad_b_enc = grad_N.new_zeros(ctx.support.width).index_add(0, ctx.support.latents_N, grad_N)
        # All tokens subtract the same b_dec, so its gradient depends only on sums over tokens.
        grad_b_dec = -weighted_sum(W_enc_FD, grad_b_enc) if ctx.needs_input_grad[3] else None
        return None, grad_W_enc, grad_b_enc, grad_b_dec, None, None
