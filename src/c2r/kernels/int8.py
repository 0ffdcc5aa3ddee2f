"""Approximate matrix products in int8, for CPUs with int8 instructions, used to find candidates for exact computation.

B tokens in a batch · D width of the activations · F latents · G groups of tokens · R rows of a piece.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from c2r.kernels.above import GROUP

_ROWS = 1024
"""Rows of W that are rounded together, few enough to stay in the CPU's cache."""
_MOST = 3.5
"""See `coarse_product`: an error exceeds the bound with a probability of 2·exp(−2·3.5²), less than one in 10¹⁰."""
_DITHER_SEED = 8_128_496
"""An unusual seed: weights initialised from the same random numbers would not be independent of the dither."""
_WIDEST = 65_536
"""Above this D, sums of 8-bit products may overflow 32 bits."""


class Coarse(NamedTuple):
    """Approximate products of rows of W with rows of x."""

    product_FB: Tensor
    """The products in units of `unit_F`, bfloat16."""
    tokens_B: Tensor
    """Index of each column's token."""
    unit_F: Tensor
    slack_FG: Tensor
    """Error bound per group of columns in the same units, without the rounding to bfloat16."""

    def floor(self, floor_F: Tensor) -> Tensor:
        """A floor `[F, G]` for `product_FB` such that every product with W·x > `floor_F` is above it."""
        low_FG = (floor_F / self.unit_F)[:, None] - self.slack_FG
        return low_FG.sub_(low_FG.abs(), alpha=2.0**-8)


def coarse_product(x_BD: Tensor, W_FD: Tensor) -> Coarse | None:
    """x·Wᵀ with both factors rounded to 8 bits, with one scale per token and per latent; None if it is not supported.

    Plain rounding could systematically remove what top-k looks for, for example everything in a token except one huge
    entry. Rounding is therefore dithered: up or down at random and unbiased, whatever the data. By Hoeffding's
    inequality, with step sizes s (x) and u (W), the error of x̂·Wᵀ is less than 3.5·√(s²·‖w‖² + u²·‖x̂‖²), except for one
    product in 10¹⁰. Tokens with similar s share a group (of `entries_above`), whose bound uses its largest s and ‖x̂‖.
    """
    on_cpu, singles = W_FD.device.type == "cpu", W_FD.dtype == x_BD.dtype == torch.float32
    groups, left_over = divmod(len(x_BD), GROUP)
    if not on_cpu or not singles or left_over or x_BD.shape[1] > _WIDEST:
        return None
    scale_B, unit_F = _scales(x_BD), _scales(W_FD)
    tokens_B = scale_B.argsort().view(groups, GROUP).T.flatten()  # column g + i·G is the i-th token of group g
    x_BD, scale_B = x_BD[tokens_B], scale_B[tokens_B]
    dither_D, up_D = _dither(x_BD.shape[1])
    # The CPU instructions take signed 8-bit integers for one factor and unsigned ones, here around 128, for the other.
    rounded_BD = (x_BD / scale_B[:, None]).add_(dither_D).floor_()
    W_8 = torch.empty(W_FD.shape, dtype=torch.uint8)
    for rows_RD, of_8, unit_R in zip(W_FD.split(_ROWS), W_8.split(_ROWS), unit_F.split(_ROWS), strict=True):
        of_8.copy_(torch.addcmul(up_D, rows_RD, unit_R.reciprocal()[:, None]))  # copying truncates
    length_B = rounded_BD.norm(dim=1) * scale_B
    length_G, step_G = (of_B.view(GROUP, groups).amax(0) for of_B in (length_B, scale_B))
    length_F = W_FD.norm(dim=1) / unit_F
    slack_FG = torch.outer(length_F, step_G).square_().add_(length_G.square()).sqrt_().mul_(_MOST)
    if not slack_FG.isfinite().all():
        return None
    product_FB = _product_of_8(W_8, _packed(rounded_BD.to(torch.int8).contiguous(), len(W_8)), scale_B)
    return Coarse(product_FB, tokens_B, unit_F, slack_FG)


@cache
def _dither(d_in: int) -> tuple[Tensor, Tensor]:
    """Offsets `[D]` added before rounding down, for x and for W (plus 128); constant, so that runs are reproducible."""
    generator = torch.Generator().manual_seed(_DITHER_SEED)
    # Below 1: the largest entry, which is 127 up to rounding, must not become 128.
    for_x_D, for_W_D = torch.rand(2, d_in, generator=generator).mul_(0.999)
    return for_x_D, for_W_D + 128


def _packed(x_8: Tensor, rows: int) -> Tensor:
    """x in the memory layout with which oneDNN multiplies `rows` rows by it."""
    return torch.ops.onednn.qlinear_prepack(x_8, [rows, x_8.shape[1]])


def _product_of_8(W_8: Tensor, packed_x: Tensor, scale_B: Tensor) -> Tensor:
    """(W − 128)·xᵀ·scale in bfloat16, `[F, B]`, by oneDNN."""
    none_B, multiply = torch.zeros(len(scale_B), dtype=torch.int64), torch.ops.onednn.qlinear_pointwise
    return multiply(W_8, 1.0, 128, packed_x, scale_B, none_B, None, 1.0, 0, torch.bfloat16, "none", [], "")


@cache
def coarse_works() -> bool:
    """Whether int8 products are correct on this CPU; without dedicated instructions they may saturate."""
    generator = torch.Generator().manual_seed(0)
    x_BD, W_FD = torch.randn(32, 256, generator=generator), torch.randn(64, 256, generator=generator)
    try:
        coarse = coarse_product(x_BD, W_FD)
    except (RuntimeError, AttributeError):  # a build of PyTorch without oneDNN
        return False
    if coarse is None:
        return False
    error_FB = coarse.product_FB - W_FD @ x_BD[coarse.tokens_B].T / coarse.unit_F[:, None]
    return bool((error_FB.abs() < coarse.slack_FG + coarse.product_FB.abs() * 2.0**-8).all())  # a single group


def _scales(rows_RD: Tensor) -> Tensor:
    """The scale of each row for which its largest absolute entry becomes 127."""
    return torch.maximum(rows_RD.amax(1), -rows_RD.amin(1)).clamp_(min=1e-30) / 127
