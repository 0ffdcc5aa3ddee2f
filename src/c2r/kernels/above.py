"""The few entries of a large matrix that are above a floor, the matrix being read once.

R, C rows and columns · N entries found · H groups looked into · G entries of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32


class Entries(NamedTuple):
    """Entries of a matrix."""

    values: Tensor
    rows: Tensor
    columns: Tensor


def entries_above(matrix_RC: Tensor, floor: float | Tensor, dim: int = 1) -> Entries:
    """The entries above `floor`, which may differ by row (`[R]`, dim 1) or by column (`[C]`, dim 0).

    The matrix is read once, for the maxima of strided groups along `dim`; few groups are looked into. It may be the
    transpose of one that is contiguous. Where rows are of whole groups (dim 1), the floor may differ by group too,
    `[R, C / GROUP]`: group g is columns g, g + C / GROUP, g + 2·C / GROUP, …
    """
    if matrix_RC.stride(0) < matrix_RC.stride(1):
        values, columns, rows = entries_above(matrix_RC.T, floor, 1 - dim)
        return Entries(values, rows, columns)
    groups = matrix_RC.shape[dim] // GROUP
    covered = groups * GROUP
    floor = torch.as_tensor(floor, dtype=torch.float32, device=matrix_RC.device)
    # Group c holds entries c, c + groups, c + 2·groups, … of a line: a maximum over lines of a contiguous view.
    grouped = matrix_RC.narrow(dim, 0, covered).unflatten(dim, (GROUP, groups))
    of_group = floor if floor.ndim == 2 else floor.reshape(-1).unsqueeze(dim)
    highest = grouped.amax(dim)
    a_H, b_H = (highest > of_group).nonzero(as_tuple=True)
    inside_HG = grouped.movedim(dim, -1)[a_H, b_H]
    line_H, group_H = (a_H, b_H) if dim == 1 else (b_H, a_H)
    hit_N, member_N = (inside_HG > of_group.expand_as(highest)[a_H, b_H, None]).nonzero(as_tuple=True)
    values, line, along = inside_HG[hit_N, member_N], line_H[hit_N], member_N * groups + group_H[hit_N]
    if covered < matrix_RC.shape[dim]:
        rest = matrix_RC.narrow(dim, covered, matrix_RC.shape[dim] - covered)
        at = (rest > of_group).nonzero(as_tuple=True)
        values, line = torch.cat([values, rest[at]]), torch.cat([line, at[1 - dim]])
        along = torch.cat([along, covered + at[dim]])
    return Entries(values, line, along) if dim == 1 else Entries(values, along, line)
