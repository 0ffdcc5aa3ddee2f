"""Find the few entries of a large matrix that are above a threshold, the floor, reading the matrix only once.

R, C rows and columns · N entries found · H groups with an entry above the floor · G entries per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32


class Entries(NamedTuple):
    """Some entries of a matrix, with their row and column indices."""

    values: Tensor
    rows: Tensor
    columns: Tensor


def entries_above(matrix_RC: Tensor, floor: float | Tensor, dim: int = 1) -> Entries:
    """The entries above `floor`: a number, or one value per row (`[R]`, dim 1) or per column (`[C]`, dim 0).

    The matrix is read once, to compute the maxima of strided groups along `dim`; only the few groups whose maximum is
    above the floor are searched. The matrix may be the transpose of a contiguous one. With dim 1 and C divisible by
    `GROUP`, the floor may also have one value per group, `[R, C / GROUP]`: group g consists of the columns g,
    g + C / GROUP, g + 2·C / GROUP, …
    """
    if matrix_RC.stride(0) < matrix_RC.stride(1):
        values, columns, rows = entries_above(matrix_RC.T, floor, 1 - dim)
        return Entries(values, rows, columns)
    groups = matrix_RC.shape[dim] // GROUP
    covered = groups * GROUP
    floor = torch.as_tensor(floor, dtype=torch.float32, device=matrix_RC.device)
    # Strided groups: group c holds entries c, c + groups, c + 2·groups, … of a line, so amax reads memory in order.
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
