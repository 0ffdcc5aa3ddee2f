"""The meta-SAE on dictionaries whose composition is known, and its reconstruction against a dense one."""

import math

import pytest
import torch
from torch import Tensor

from c2r.eval.splitting import composition as module
from c2r.eval.splitting.composition import composition, random_composition
from c2r.neighbors import unit_rows
from c2r.sae.selection import BatchTopK


def composed(rows: int, d_in: int, atoms: int) -> Tensor:
    """Rows that are sums of 4 of few random directions."""
    generator = torch.Generator().manual_seed(100)
    atom_rows = unit_rows(torch.randn(atoms, d_in, generator=generator))
    return torch.stack([atom_rows[torch.randperm(atoms, generator=generator)[:4]].sum(0) for _ in range(rows)])


def test_a_composed_dictionary_scores_high_and_a_random_one_low() -> None:
    high, low = composition(composed(512, 64, 32)), random_composition(512, 64)
    assert high.explained_variance > 0.95
    assert low.explained_variance < 0.7
    assert high.rows == low.rows == 512
    assert low.meta_alive > 0.95


def test_few_distinct_rows_are_explained_whole() -> None:
    rows = torch.eye(8).repeat(8, 1)
    found = composition(rows)
    assert found.explained_variance > 0.99


@pytest.mark.usefixtures("quick_meta")
def test_same_seed_same_figure_whatever_the_norms() -> None:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    first = composition(rows, seed=1)
    scale = torch.linspace(0.1, 9, 64)[:, None]
    assert composition(rows, seed=1) == first
    assert composition(scale * rows, seed=1).explained_variance == pytest.approx(first.explained_variance, abs=1e-3)
    assert composition(rows, seed=2) != first
    with torch.no_grad():  # evaluations run without autograd
        assert composition(rows, seed=1) == first


def test_no_figure_where_there_is_nothing_to_learn() -> None:
    assert math.isnan(composition(torch.randn(15, 8)).explained_variance)
    assert math.isnan(composition(torch.ones(40, 8)).explained_variance)
    assert composition(torch.zeros(0, 8)).rows == 0


@pytest.mark.usefixtures("quick_meta")
def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 32)
    assert composition(torch.randn(100, 8)).rows == 32
    assert random_composition(100, 8).rows == 32


def test_reconstruction_is_of_the_four_largest_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, meta_enc, meta_dec = (torch.randn(*shape, generator=generator) for shape in ((20, 6), (9, 6), (9, 6)))
    bias, mean = torch.randn(9, generator=generator), torch.randn(6, generator=generator)
    rebuilt, _ = module._Meta(meta_enc, bias, meta_dec, mean).rebuild(rows, BatchTopK())
    pre = (rows - mean) @ meta_enc.T + bias
    cut = pre.flatten().sort(descending=True).values[20 * 4 - 1]
    acts = torch.where((pre >= cut) & (pre > 0), pre, 0.0)
    torch.testing.assert_close(rebuilt, acts @ meta_dec + mean)
