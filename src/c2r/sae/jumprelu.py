"""JumpReLU and its L0, with straight-through gradients for the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

A jump has no derivative; a rectangle of width ε around the threshold stands in for it. B tokens · F latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return pre_BF * (pre_BF > threshold_F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre_BF, threshold_F = ctx.saved_tensors
        near_BF = _rectangle(pre_BF, threshold_F, ctx.bandwidth)
        of_threshold = -(threshold_F / ctx.bandwidth) * (near_BF * grads[0]).sum(0)
        return grads[0] * (pre_BF > threshold_F), of_threshold, None


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(acts_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return (acts_BF > threshold_F).to(acts_BF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts_BF, threshold_F = ctx.saved_tensors
        near_BF = _rectangle(acts_BF, threshold_F, ctx.bandwidth)
        return None, -(near_BF * grads[0]).sum(0) / ctx.bandwidth, None


def jump_relu(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """Pre-activations above their latent's threshold, 0 elsewhere."""
    acts_BF: Any = _Jump.apply(pre_BF, threshold_F, bandwidth)
    return acts_BF


def soft_l0(acts_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """Mean number of active latents a token, with a gradient for the thresholds and none for the activations."""
    count_BF: Any = _Count.apply(acts_BF, threshold_F, bandwidth)
    return count_BF.sum(1).mean()


def _rectangle(value_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    return (value_BF - threshold_F).abs() < bandwidth / 2
