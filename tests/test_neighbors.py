"""Neighbour search against brute force; the table's promise that every row is renewed within a cycle."""

import itertools

import pytest
import torch
from torch import Tensor

from c2r.kernels import nearest as tiles
from c2r.neighbors import NeighborTable, nearest_neighbors


def brute_force(decoder: Tensor) -> tuple[Tensor, Tensor]:
    unit = torch.nn.functional.normalize(decoder.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    return cosine.max(1).indices, cosine.max(1).values


@pytest.mark.parametrize("width", [2, 3, 16, 17, 50, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_search_across_tiles(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 16)
    decoder = torch.randn(width, 6, generator=torch.Generator().manual_seed(width), dtype=dtype)
    index, cosine = brute_force(decoder)
    found = nearest_neighbors(decoder)
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.cosine.double(), cosine, rtol=0, atol=1e-6)


def test_no_gradient_is_recorded_and_low_precision_is_searched_in_fp32() -> None:
    decoder = torch.randn(9, 4, dtype=torch.bfloat16, requires_grad=True)
    found = nearest_neighbors(decoder)
    assert not found.cosine.requires_grad
    assert found.cosine.dtype == torch.float32


def test_a_callers_autocast_does_not_decide_near_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 16, generator=generator).repeat_interleave(200, 0)
    decoder = centres + 1e-3 * torch.randn(400, 16, generator=generator)
    tables = [NeighborTable(rows=50) for _ in range(2)]
    found = [nearest_neighbors(decoder).index, *(tables[0].refresh(decoder).index for _ in range(2))]
    with torch.autocast("cpu", torch.bfloat16):
        assert (decoder @ decoder.T).dtype == torch.bfloat16
        inside = [nearest_neighbors(decoder).index, *(tables[1].refresh(decoder).index for _ in range(2))]
    for before, within in zip(found, inside, strict=True):
        assert before.equal(within)


def test_zero_rows_and_ties() -> None:
    decoder = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = nearest_neighbors(decoder)
    assert found.cosine.tolist() == [0, 1, 1, 1]
    assert all(i != j for i, j in enumerate(found.index.tolist()))


def test_chunked_search_looks_inside_a_chunk_only() -> None:
    decoder = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found = nearest_neighbors(decoder, mode="chunked", chunk=8, generator=torch.Generator().manual_seed(5))
    unit = torch.nn.functional.normalize(decoder, dim=1)
    for members in torch.randperm(40, generator=torch.Generator().manual_seed(5)).split(8):
        cosine = (unit[members] @ unit[members].T).fill_diagonal_(-2)
        assert torch.equal(found.index[members], members[cosine.max(1).indices])
    exact = nearest_neighbors(decoder)
    assert (found.cosine <= exact.cosine + 1e-6).all()
    assert (found.index != exact.index).float().mean() > 0.5
    whole = nearest_neighbors(decoder, mode="chunked", chunk=8192)
    assert torch.equal(whole.index, exact.index)


def test_a_chunk_of_one_has_no_neighbour() -> None:
    found = nearest_neighbors(torch.ones(9, 2), mode="chunked", chunk=4, generator=torch.Generator().manual_seed(0))
    alone = found.index == torch.arange(9)
    assert alone.sum() == 1
    assert found.cosine[alone].item() == 0


def test_lagged_table_is_exact_first_and_again_after_a_cycle() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(50, 6, generator=generator) for _ in range(2))
    table = NeighborTable("lagged", rows=7)
    assert torch.equal(table.refresh(before).index, brute_force(before)[0])
    stale, gained = [], []
    for _ in range(8):
        stale.append(int((table.refresh(after).index != brute_force(after)[0]).sum()))
        gained.append((table.churn.item(), table.regret.item()))
    assert all(churn > 0.5 and regret > 0.1 for churn, regret in gained)
    table.refresh(after)
    assert (table.churn, table.regret) == (0, pytest.approx(0, abs=1e-6))
    assert stale == sorted(stale, reverse=True)
    assert stale[0] > 0
    assert stale[-1] == 0


def test_the_shortlist_finds_the_nearest_before_its_row_is_renewed() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(60, 8, generator=generator)
    table = NeighborTable("lagged", rows=60, shortlist=10)
    table.refresh(decoder), table.refresh(decoder)  # the second renews every row and its shortlist
    table.rows = 1
    moved = decoder + 0.3 * torch.randn(60, 8, generator=generator)
    index, cosine = brute_force(moved)
    unit = torch.nn.functional.normalize(moved.double(), dim=1)
    short = [(unit * unit[table.refresh(moved).index]).sum(1) for _ in range(10)]  # once through the shortlists
    found = short[-1]
    assert all((b >= a - 1e-6).all() for a, b in itertools.pairwise(short))
    assert (found > cosine - 1e-6).float().mean() > 0.9  # 10 rows were renewed by then
    stale = (unit * unit[brute_force(decoder)[0]]).sum(1)
    assert (stale > cosine - 1e-6).float().mean() < 0.7
    table.shortlist_MF = index.repeat(10, 1)
    assert torch.equal(table.refresh(moved).index, index)


def test_a_refresh_leaves_the_last_result_alone() -> None:
    table = NeighborTable("lagged", rows=8)
    first = table.refresh(torch.randn(8, 3)).index
    kept = first.clone()
    table.refresh(torch.randn(8, 3))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("mode", ["lagged", "chunked"])
def test_a_restored_table_goes_on_the_same(mode: str) -> None:
    decoders = torch.randn(6, 30, 5, generator=torch.Generator().manual_seed(1))
    table = NeighborTable(mode, rows=8, chunk=8, seed=3)
    for decoder in decoders[:3]:
        table.refresh(decoder)
    other = NeighborTable(mode, rows=8, chunk=8, seed=9)
    other.load_state_dict(table.state_dict())
    for decoder in decoders[3:]:
        for found, expected in zip(other.refresh(decoder), table.refresh(decoder), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["lagged", "exact", "chunked"])
def test_cosines_are_those_of_the_decoder_as_it_is(mode: str) -> None:
    table = NeighborTable(mode, rows=4, shortlist=5, chunk=7)
    for decoder in torch.randn(5, 30, 6, generator=torch.Generator().manual_seed(2)):
        decoder[3] = 0
        index, cosine = table.refresh(decoder)
        expected = torch.nn.functional.cosine_similarity(decoder, decoder[index], dim=1)
        expected[index == torch.arange(30)] = 0
        torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"mode": "approximate"}, "mode"), ({"mode": "chunked", "chunk": 1}, "chunk")],
)
def test_wrong_arguments(arguments: dict[str, object], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        nearest_neighbors(torch.ones(4, 2), **arguments)


def test_one_latent_has_no_pair() -> None:
    with pytest.raises(ValueError, match="F ≥ 2"):
        nearest_neighbors(torch.ones(1, 3))
