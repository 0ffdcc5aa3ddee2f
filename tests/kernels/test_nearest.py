"""Entries above a floor and nearest rows from low-precision products, against brute force in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from c2r.kernels import nearest as tiles
from c2r.kernels.above import entries_above
from c2r.kernels.nearest import nearest_in_tiles, nearest_of_slice
from c2r.neighbors import inverse_norms


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90), st.integers(1, 150), st.floats(-2, 2), st.sampled_from([0, 1]), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_entries_above_a_floor_are_all_found(
    rows: int, columns: int, floor: float, dim: int, by_line: bool, low: bool, turned: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator).to(torch.bfloat16 if low else torch.float32)
    if turned:
        matrix = matrix.T.contiguous().T
    floors = floor + torch.randn(matrix.shape[1 - dim], generator=generator) if by_line else torch.tensor(floor)
    found = entries_above(matrix, floors if by_line else floor, dim)
    expected = (matrix.float() > (floors.unsqueeze(dim) if by_line else floors)).nonzero().tolist()
    assert sorted(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == list(map(tuple, expected))
    assert torch.equal(matrix[found.rows, found.columns], found.values)


def nearest(rows: Tensor) -> tuple[Tensor, Tensor]:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    return cosine.max(1).indices, cosine.max(1).values


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 120), st.integers(2, 24), st.integers(0, 60), st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_the_nearest_is_found_among_many_about_as_near(
    width: int, d_in: int, alike: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(width, d_in, generator=generator)
    rows[:alike] = rows[0] + 0.01 * torch.randn(len(rows[:alike]), d_in, generator=generator)
    index, cosine = nearest(rows)
    tile, tiles.TILE = tiles.TILE, 32
    crowd, tiles._CROWDED = tiles._CROWDED, seed % 6  # 0: every tile is compared in full precision
    try:
        found = nearest_in_tiles(torch.nn.functional.normalize(rows, dim=1), dtype)
    finally:
        tiles.TILE, tiles._CROWDED = tile, crowd
    torch.testing.assert_close(found.cosine.double(), cosine, rtol=0, atol=1e-6)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    torch.testing.assert_close((unit * unit[found.index]).sum(1), cosine, rtol=0, atol=1e-6)
    assert (found.index != torch.arange(width)).all()
    clear = (unit @ unit.T).fill_diagonal_(-2).topk(min(2, width), dim=1).values
    sure = clear[:, 0] > clear[:, -1] + 1e-6 if width > 2 else torch.ones(2, dtype=torch.bool)
    assert torch.equal(found.index[sure], index[sure])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_nearest_of_a_slice_of_rows_of_any_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 16, generator=generator)
    index, cosine = nearest(rows)
    unit_rows = torch.nn.functional.normalize(rows, dim=1)
    found, near = nearest_of_slice(unit_rows, inverse_norms(unit_rows), 40, 90, dtype, 8)
    assert torch.equal(found.index, index[40:90])
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    eighth = (unit @ unit.T).fill_diagonal_(-2)[40:90].topk(8, dim=1).values[:, -1:]
    assert ((unit[40:90, None] * unit[near]).sum(2) > eighth - (0.02 if dtype == torch.bfloat16 else 1e-6)).all()
    assert all(len(set(line)) == 8 for line in near.tolist())
    torch.testing.assert_close(found.cosine.double(), cosine[40:90], rtol=0, atol=1e-6)
    other_norms = rows * torch.rand(300, 1, generator=generator).add(0.1)
    scaled, _ = nearest_of_slice(other_norms, inverse_norms(other_norms), 40, 90, dtype, 8)
    torch.testing.assert_close(scaled.cosine.double(), cosine[40:90], rtol=0, atol=0.01)


def test_equal_rows_and_zero_rows_meet_the_lowest_other() -> None:
    rows = torch.ones(200, 8)
    rows[150:] = 0
    found = nearest_in_tiles(torch.nn.functional.normalize(rows, dim=1), torch.bfloat16)
    assert found.index[:3].tolist() == [1, 0, 0]
    assert (found.index[3:150] == 0).all()
    torch.testing.assert_close(found.cosine[:150], torch.ones(150))
    assert (found.cosine[150:] == 0).all()
