"""JumpReLU and its L0, with straight-through gradients for the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

A jump has no derivative; its pseudo-derivative is a rectangle of width ε around the threshold. All functions accept
dense or sparse values; sparse ones must include every entry above the threshold minus ε/2.

B tokens in a batch · F latents · N entries of a support.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from c2r.kernels.codes import Acts, Codes


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        of_threshold = -(threshold / ctx.bandwidth) * (_near(pre, threshold, ctx.bandwidth) * grads[0])
        return grads[0] * (pre > threshold), of_threshold.sum_to_size(threshold.shape), None


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, threshold_F: Tensor, values: Acts, bandwidth: float, absent: float) -> Tensor:
        ctx.save_for_backward(threshold_F)
        ctx.given = values, bandwidth, absent
        return _per_latent(values, threshold_F, absent, lambda value, threshold: value > threshold).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (threshold_F,) = ctx.saved_tensors
        values, bandwidth, absent = ctx.given
        near_F = _per_latent(values, threshold_F, absent, lambda value, threshold: _near(value, threshold, bandwidth))
        return -grads[0] * near_F / bandwidth, None, None, None


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Pre-activations above their threshold, else 0; shapes are `[B, F]` and `[F]`, or `[N]` and `[N]`."""
    acts: Any = _Jump.apply(pre, threshold, bandwidth)
    return acts


def soft_l0(pre: Acts, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """Mean number of active latents per token, from pre-activations; only the thresholds get a gradient.

    The gradient for θ is −(1/ε)·P(|π − θ| < ε/2), equations 11 and 12 of arXiv 2407.14435. Entries missing from sparse
    `pre` are treated as far below the threshold.
    """
    return _counted(pre, threshold_F, bandwidth, -math.inf)


def published_soft_l0(acts: Acts, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """Like `soft_l0`, but computed from activations after the jump, as in published training code.

    The count is the same, but the gradient differs. Entries slightly below θ are already 0, so the lower half of the
    rectangle is lost; and if θ < ε/2, all silent entries count as near the threshold.
    """
    return _counted(acts, threshold_F, bandwidth, 0.0)


def _counted(values: Acts, threshold_F: Tensor, bandwidth: float, absent: float) -> Tensor:
    held = Codes(values.values_N.detach(), values.support) if isinstance(values, Codes) else values.detach()
    count: Any = _Count.apply(threshold_F, held, bandwidth, absent)
    return count / (held.support.batch if isinstance(held, Codes) else len(held))


def _near(value: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (value - threshold).abs() < bandwidth / 2


def _per_latent(values: Acts, threshold_F: Tensor, absent: float, holds: Any) -> Tensor:
    """Number of tokens with `holds(value, threshold)` per latent `[F]`; entries that are not stored equal `absent`."""
    if isinstance(values, Tensor):
        return holds(values, threshold_F).sum(0).to(threshold_F)
    at, zeros_F = values.support, torch.zeros_like(threshold_F)
    stored_F = zeros_F.index_add(0, at.latents_N, torch.ones_like(values.values_N))
    held_N = holds(values.values_N, threshold_F[at.latents_N]).to(threshold_F)
    rest_F = (at.batch - stored_F) * holds(torch.full_like(zeros_F, absent), threshold_F)
    return zeros_F.index_add(0, at.latents_N, held_N) + rest_F
