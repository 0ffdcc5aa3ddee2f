"""Products of selected rows: weighted sums of rows, and dot products of pairs of rows, without an N×D tensor.

R, F rows of the two matrices · D their width · N pairs, sorted by their first row · n pairs of a piece.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_PIECE = 1024
"""Rows per piece in `weighted_sum`."""

_PAIRS = 2**25
"""Largest number of pairs per embedding_bag call: on a GPU it uses 32 threads per pair and counts them in 32 bits."""


def row_starts(sorted_N: Tensor, size: int) -> Tensor:
    """Index of the first entry of each of `size` rows in entries sorted by row, and their total, `[size + 1]`."""
    return torch.searchsorted(sorted_N, torch.arange(size + 1, device=sorted_N.device))


def gather_sum(source: Tensor, index_N: Tensor, starts: Tensor, weight_N: Tensor) -> Tensor:
    """Weighted sums of rows: row r is Σ weight_n · source[index_n] over n from starts[r] to starts[r + 1]."""
    return F.embedding_bag(index_N, source, starts, mode="sum", per_sample_weights=weight_N, include_last_offset=True)


def row_dots(rows_RD: Tensor, source_FD: Tensor, index_N: Tensor, starts: Tensor) -> Tensor:
    """Dot products rows[r] · source[index_n] for n from starts[r] to starts[r + 1], `[N]`, without an N×D tensor."""
    if rows_RD.device.type != "cpu" or rows_RD.dtype not in (torch.float32, torch.float64):
        return _row_dots_by_embedding_bag(rows_RD, source_FD, index_N, starts)
    _quieten_csr()
    shape, zeros_N = (len(rows_RD), len(source_FD)), rows_RD.new_zeros(len(index_N))
    pairs = torch.sparse_csr_tensor(starts, index_N, zeros_N, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pairs, rows_RD, source_FD.T, beta=0.0).values()


def _row_dots_by_embedding_bag(rows_RD: Tensor, source_FD: Tensor, index_N: Tensor, starts: Tensor) -> Tensor:
    """The same for GPUs and half precision, computed as the gradient of a weighted sum of rows in its weights."""
    row_R = torch.arange(len(rows_RD), device=starts.device)
    row_N = row_R.repeat_interleave(starts.diff(), output_size=len(index_N))
    backward, bags = torch.ops.aten._embedding_bag_per_sample_weights_backward, row_N.new_zeros(0)
    rows_RD, source_FD = rows_RD.contiguous(), source_FD.contiguous()
    pieces = zip(row_N.split(_PAIRS), index_N.split(_PAIRS), strict=True)
    dots = [backward(rows_RD, source_FD, index_n, bags, row_n, 0) for row_n, index_n in pieces]
    return dots[0] if len(dots) == 1 else torch.cat(dots)


@cache
def _quieten_csr() -> None:
    """Trigger PyTorch's one-time warning about CSR tensors here, suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def weighted_sum(rows_FD: Tensor, weight_F: Tensor) -> Tensor:
    """Σ weight_i · row_i, `[D]`. In pieces on a CPU, where a product with a single row would use only one core."""
    if rows_FD.device.type != "cpu":
        return weight_F @ rows_FD
    width = len(rows_FD)
    starts = torch.arange(0, -(-width // _PIECE) * _PIECE + 1, _PIECE).clamp_(max=width)
    return gather_sum(rows_FD, torch.arange(width), starts, weight_F).sum(0)
