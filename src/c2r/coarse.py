"""Products in int8, on CPUs that have instructions for them: fast, and close enough to tell who need be looked at.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.tiles import quick_dtype

_ROWS = 1024
"""Rows of W that stay in the cache between the passes that round them."""
_DEVIATIONS = 8.0
"""How far rounding may move a product, in its standard deviations: beyond them lies less than one in 10¹⁴."""


class Coarse(NamedTuple):
    """Products of rows of W with rows of x, about."""

    product_BF: Tensor
    """In units of `unit_F`, bfloat16; the transpose of a contiguous one."""
    unit_F: Tensor
    slack_F: Tensor
    """What rounding may have taken from a product, in the same units, besides bfloat16's own rounding."""

    def floor(self, floor_F: Tensor) -> Tensor:
        """The floor, in these units, above which every product lies that is above `floor_F`, in the units of W·x."""
        at_F = floor_F / self.unit_F
        return at_F - at_F.abs() * 2.0**-8 - self.slack_F


def coarse_product(x_BD: Tensor, W_FD: Tensor) -> Coarse:
    """x·Wᵀ from both rounded to 8 bits, each token and each latent with a scale of its own.

    The rounding errors of D products add up like independent ones, to a standard deviation of
    √(‖x_t‖²·u_f² + ‖w_f‖²·s_t²)/√12 for the scales s_t and u_f; the tokens' largest norm and scale stand for all.
    """
    scale_B, unit_F = _scales(x_BD), _scales(W_FD)
    # Signed 8 bits for one side, unsigned ones around 128 for the other: what the processors' instructions take.
    x_8 = (x_BD / scale_B[:, None]).round_().to(torch.int8)
    W_8 = torch.empty(W_FD.shape, dtype=torch.uint8)
    for rows_RD, of_8, unit_R in zip(W_FD.split(_ROWS), W_8.split(_ROWS), unit_F.split(_ROWS), strict=True):
        of_8.copy_((rows_RD * unit_R.reciprocal()[:, None]).add_(128.5))  # truncated, so rounded
    norms_F = W_FD.norm(dim=1) / unit_F
    deviation_F = (x_BD.norm(dim=1).max().square() + (norms_F * scale_B.max()).square()).sqrt() / math.sqrt(12)
    return Coarse(_product_of_8(W_8, x_8, scale_B).T, unit_F, _DEVIATIONS * deviation_F)


def _product_of_8(W_8: Tensor, x_8: Tensor, scale_B: Tensor) -> Tensor:
    """(W − 128)·xᵀ·scale in bfloat16, `[F, B]`, by oneDNN."""
    ops: Any = torch.ops.onednn
    packed, none_B = ops.qlinear_prepack(x_8, list(W_8.shape)), torch.zeros(len(x_8), dtype=torch.int64)
    return ops.qlinear_pointwise(W_8, 1.0, 128, packed, scale_B, none_B, None, 1.0, 0, torch.bfloat16, "none", [], "")


@cache
def coarse_works() -> bool:
    """Whether this processor's products in int8 are right: those without the instructions for it may saturate."""
    generator = torch.Generator().manual_seed(0)
    x_BD, W_FD = torch.randn(32, 256, generator=generator), torch.randn(64, 256, generator=generator)
    try:
        coarse = coarse_product(x_BD, W_FD)
    except (RuntimeError, AttributeError):  # a build of PyTorch without oneDNN
        return False
    error_BF = coarse.product_BF - x_BD @ W_FD.T / coarse.unit_F
    return bool((error_BF.abs() < coarse.slack_F + coarse.product_BF.abs() * 2.0**-8).all())


@cache
def coarse_pays(device: torch.device) -> bool:
    """Whether they are also clearly faster than products in the quickest other precision; measured once."""
    if device.type != "cpu" or not coarse_works():
        return False
    W, x = torch.zeros(1024, 512), torch.zeros(2048, 512)
    low, scale_B = quick_dtype(device), torch.ones(len(x))
    W_low, x_low, W_8, x_8 = W.to(low), x.to(low), W.to(torch.uint8), x.to(torch.int8)
    ways = (lambda: _product_of_8(W_8, x_8, scale_B), lambda: F.linear(W_low, x_low))
    best = [math.inf, math.inf]
    for _ in range(5):
        for number, way in enumerate(ways):  # in turns, so that whatever else runs disturbs both
            start = time.perf_counter()
            way()
            best[number] = min(best[number], time.perf_counter() - start)
    return best[0] < 0.8 * best[1]


def _scales(rows_RD: Tensor) -> Tensor:
    """The scale with which a row's largest entry is 127."""
    return torch.linalg.vector_norm(rows_RD, ord=torch.inf, dim=1).clamp_(min=1e-30) / 127
