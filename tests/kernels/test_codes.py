"""Sparse products equal their dense forms, values and gradients, over random shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from c2r.kernels import rows as rows_module
from c2r.kernels.codes import Codes, Support, decode, encode_at, fired, from_dense, join, l0, norms, take, to_dense
from c2r.kernels.rows import row_dots
from c2r.sae.selection import BatchTopK

shapes = st.tuples(st.integers(1, 9), st.integers(2, 12), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6))


def sparse_acts(batch: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    acts = torch.rand(batch, width, generator=generator, dtype=torch.double) + 0.1
    return acts * (torch.rand(batch, width, generator=generator) < share)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_decode_and_reductions_equal_dense(shape: tuple[int, int, int, float, int]) -> None:
    batch, width, d_in, share, seed = shape
    generator = torch.Generator().manual_seed(seed)
    dense = sparse_acts(batch, width, share, generator)
    weight = torch.randn(width, d_in, generator=generator, dtype=torch.double)
    bias = torch.randn(d_in, generator=generator, dtype=torch.double)
    target = torch.randn(batch, d_in, generator=generator, dtype=torch.double)
    gradients = []
    for sparse in (False, True):
        acts, W, b = (t.clone().requires_grad_() for t in (dense, weight, bias))
        used = from_dense(acts) if sparse else acts
        loss = (decode(used, W, b) - target).square().sum() + norms(used).sum()
        of_acts, of_W, of_b = torch.autograd.grad(loss, (acts, W, b))
        # A silent entry is no part of the sparse graph.
        gradients.append((loss.detach(), of_acts * (dense != 0), of_W, of_b))
        assert torch.equal(to_dense(used).detach(), dense)
        assert l0(used).item() == pytest.approx((dense != 0).sum().item() / batch)
        assert torch.equal(fired(used), (dense != 0).any(0))
    for of_dense, of_sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(of_sparse, of_dense, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(shapes, st.booleans())
def test_encode_at_equals_dense(shape: tuple[int, int, int, float, int], subtract: bool) -> None:
    batch, width, d_in, share, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator, dtype=torch.double)
    where = sparse_acts(batch, width, share, generator) != 0
    tokens, latents = where.nonzero(as_tuple=True)
    weights = torch.rand(len(tokens), generator=generator, dtype=torch.double)
    results = []
    for sparse in (False, True):
        W = torch.randn(width, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.double).requires_grad_()
        b = torch.ones(width, dtype=torch.double).requires_grad_()
        b_dec = torch.full((d_in,), 0.5, dtype=torch.double).requires_grad_()
        if sparse:
            values = encode_at(Support(latents, tokens, batch, width), x, W, b, b_dec if subtract else None)
        else:
            values = ((x - b_dec if subtract else x) @ W.T + b)[tokens, latents]
        loss = (values * weights).sum()
        found = torch.autograd.grad(loss, (W, b, b_dec), allow_unused=True)
        results.append((values, *(torch.zeros(()) if g is None else g for g in found)))
    for of_dense, of_sparse in zip(*results, strict=True):
        torch.testing.assert_close(of_sparse, of_dense, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 8), st.integers(2, 80), st.integers(1, 10), st.integers(0, 10**6), st.integers(1, 3))
def test_batch_top_k_selects_the_exact_set(batch: int, width: int, k: int, seed: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    select = BatchTopK()
    for _ in range(rounds):  # from the second on, the floor of the round before picks the candidates
        product, bias = (torch.randn(*shape, generator=generator) for shape in ((batch, width), (width,)))
        pre = product + bias - 0.5
        support = select.select(product, bias - 0.5, min(k, width))
        positive = pre[pre > 0].sort(descending=True).values[: batch * min(k, width)]
        chosen = pre[support.tokens_N, support.latents_N]
        assert torch.equal(chosen.sort(descending=True).values, positive)
        assert torch.equal(support.tokens_N, support.tokens_N.sort().values)


def test_floor_that_leaves_too_few_falls_back() -> None:
    select = BatchTopK()
    select.select(torch.full((2, 4), 9.0), torch.zeros(4), 2)
    support = select.select(torch.tensor([[1.0, 2.0, 3.0, -1.0], [0.5, 0.1, 4.0, 0.0]]), torch.zeros(4), 2)
    assert sorted(zip(support.tokens_N.tolist(), support.latents_N.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 2),
    ]  # fmt: skip


def test_ties_fill_exactly_the_budget() -> None:
    support = BatchTopK().select(torch.ones(4, 6), torch.zeros(6), 3)
    assert len(support.latents_N) == 12


def test_empty_tokens_decode_to_the_bias() -> None:
    empty = Support(torch.tensor([1]), torch.tensor([2]), 4, 3)
    out = decode(Codes(torch.tensor([2.0]), empty), torch.eye(3), torch.ones(3))
    assert out.tolist() == [[1, 1, 1], [1, 1, 1], [1, 3, 1], [1, 1, 1]]


def test_no_code_at_all() -> None:
    none = Codes(torch.zeros(0), Support(torch.zeros(0).long(), torch.zeros(0).long(), 2, 3))
    assert torch.equal(decode(none, torch.eye(3), torch.ones(3)), torch.ones(2, 3))
    assert torch.equal(norms(none), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dots_of_pairs_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_PAIRS", 7)
    # Whole numbers, whose products and sums are exact in every precision.
    generator = torch.Generator().manual_seed(0)
    rows, source = (torch.randint(-4, 5, (size, 3), generator=generator).to(dtype) for size in (5, 9))
    index, starts = torch.randint(9, (20,), generator=generator), torch.tensor([0, 0, 7, 8, 20, 20])
    expected = (rows[[1] * 7 + [2] + [3] * 12] * source[index]).sum(1)
    for dots in (row_dots, rows_module._row_dots_by_embedding_bag):  # the second is a GPU's, in pieces
        assert torch.equal(dots(rows, source, index, starts), expected)
        assert len(dots(rows, source, index[:0], torch.zeros(6).long())) == 0
    sizes, kernel = list[int](), torch.ops.aten._embedding_bag_per_sample_weights_backward

    def counted(rows: Tensor, source: Tensor, index: Tensor, *more: Any) -> Tensor:
        sizes.append(len(index))
        return kernel(rows, source, index, *more)

    monkeypatch.setattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", counted)
    rows_module._row_dots_by_embedding_bag(rows, source, index, starts)
    assert sizes == [7, 7, 6]


def test_rows_are_taken_and_joined() -> None:
    dense = torch.relu(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    dense[4] = 0
    order = torch.tensor([4, 8, 0, 0, 3])
    assert torch.equal(to_dense(take(from_dense(dense), order)), dense[order])
    assert torch.equal(to_dense(join([from_dense(part) for part in dense.split(4)])), dense)
    assert to_dense(take(from_dense(dense), order[:0])).shape == (0, 5)
