"""JumpReLU and its L0, with straight-through gradients for the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

A jump has no derivative; a rectangle of width ε around the threshold stands in for it. Both take activations dense or
sparse; sparse ones need every entry above the threshold less ε/2.

B tokens · F latents · N entries, those of `[B, F]` or of a support.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from c2r.codes import Acts, Codes


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
    def forward(ctx: Any, threshold_F: Tensor, acts: Acts, bandwidth: float) -> Tensor:
        ctx.save_for_backward(threshold_F)
        ctx.acts, ctx.bandwidth = acts, bandwidth
        return _per_latent(acts, threshold_F, lambda value, threshold: value > threshold).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (threshold_F,) = ctx.saved_tensors
        near_F = _per_latent(ctx.acts, threshold_F, lambda value, threshold: _near(value, threshold, ctx.bandwidth))
        return -grads[0] * near_F / ctx.bandwidth, None, None


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Pre-activations above their threshold, 0 elsewhere: `[B, F]` and `[F]`, or `[N]` and `[N]`."""
    acts: Any = _Jump.apply(pre, threshold, bandwidth)
    return acts


def soft_l0(acts: Acts, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """Mean number of active latents a token, with a gradient for the thresholds and none for the activations."""
    held = Codes(acts.values_N.detach(), acts.support) if isinstance(acts, Codes) else acts.detach()
    count: Any = _Count.apply(threshold_F, held, bandwidth)
    return count / (held.support.batch if isinstance(held, Codes) else len(held))


def _near(value: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (value - threshold).abs() < bandwidth / 2


def _per_latent(acts: Acts, threshold_F: Tensor, holds: Any) -> Tensor:
    """On how many tokens `holds(activation, threshold)`, for each latent `[F]`; zeros that are not stored count too."""
    if isinstance(acts, Tensor):
        return holds(acts, threshold_F).sum(0).to(threshold_F)
    at, zeros_F = acts.support, torch.zeros_like(threshold_F)
    stored_F = zeros_F.index_add(0, at.latents_N, torch.ones_like(acts.values_N))
    stored_hold_F = zeros_F.index_add(0, at.latents_N, holds(acts.values_N, threshold_F[at.latents_N]).to(threshold_F))
    return stored_hold_F + (at.batch - stored_F) * holds(zeros_F, threshold_F)
