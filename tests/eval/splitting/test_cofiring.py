"""Co-firing of nearest neighbours against counting by hand and brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c2r.eval.splitting.cofiring import Cofiring
from c2r.neighbors import random_floor


def counted(decoder: torch.Tensor, acts: torch.Tensor, size: int = 3) -> Cofiring:
    """Added in uneven batches."""
    found = Cofiring(decoder)
    for part in acts.split(size):
        found.add(part)
    return found


def test_always_and_never_together() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, -1.0]])
    fires = torch.zeros(8, 5)
    fires[:4, 0] = fires[:4, 1] = 1.0  # always together: φ = 1
    fires[:4, 2] = fires[4:, 3] = 1.0  # never together, one always on: φ = −1
    found = counted(decoder, fires)
    assert found.pairs.phi_A.tolist() == pytest.approx([1, 1, -1, -1])  # of alive latents
    assert found.pairs.jaccard_A.tolist() == pytest.approx([1, 1, 0, 0])
    assert found.pairs.neighbor_given_latent_A.tolist() == pytest.approx([1, 1, 0, 0])
    assert found.metrics()["neighbor_phi_mean"] == pytest.approx(0)
    cosine = 0.9 / math.sqrt(0.82)
    assert found.pairs.cosine_A.tolist() == pytest.approx([cosine] * 4)  # the dead latent is left out
    assert found.metrics()["max_cos_share_over_0_9"] == 1
    assert found.metrics()["max_cos_mean"] == pytest.approx(cosine)


def test_a_dead_latent_is_nobodys_neighbour() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.99, 0.02], [0.9, 0.3]])
    found = counted(decoder, torch.tensor([[1.0, 0, 1], [0, 0, 0]]))
    assert found.pairs.phi_A.tolist() == pytest.approx([1, 1])
    assert found.pairs.neighbor_A.tolist() == [2, 0]
    assert found.pairs.cosine_A[0].item() == pytest.approx(0.9 / math.hypot(0.9, 0.3))


def test_random_floor_is_about_what_random_directions_have() -> None:
    decoder = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    found = counted(decoder, torch.ones(1, 4096)).metrics()
    assert found["max_cos_mean"] == pytest.approx(random_floor(4096, 512), rel=0.15)
    assert found["max_cos_random_floor"] == pytest.approx(0.18, abs=0.005)


def test_a_latent_duplicated_by_hand_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(40, 16, generator=generator)
    acts = torch.relu(torch.randn(500, 40, generator=generator) - 1)
    decoder[31], acts[:, 31] = 3 * decoder[7], acts[:, 7]
    pairs = counted(decoder, acts, 200).pairs
    best = int(pairs.cosine_A.argmax())
    assert {int(pairs.latent_A[best]), int(pairs.neighbor_A[best])} == {7, 31}
    for latent, twin in ((7, 31), (31, 7)):
        assert pairs.neighbor_A[latent] == twin
        for figure in (pairs.cosine_A, pairs.phi_A, pairs.jaccard_A, pairs.neighbor_given_latent_A):
            assert figure[latent].item() == pytest.approx(1, abs=1e-6)


def test_a_child_fires_with_its_parent() -> None:
    decoder = torch.tensor([[1.0, 0.0], [1.0, 0.2]])
    acts = torch.zeros(10, 2)
    acts[:6, 0] = acts[:2, 1] = 1.0
    pairs = counted(decoder, acts).pairs
    assert pairs.neighbor_given_latent_A.tolist() == pytest.approx([2 / 6, 1])  # P(child | parent), P(parent | child)
    assert pairs.latent_given_neighbor_A.tolist() == pytest.approx([1, 2 / 6])
    assert pairs.jaccard_A.tolist() == pytest.approx([2 / 6] * 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 40), st.integers(1, 7))
def test_against_brute_force(seed: int, width: int, tokens: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(width, 4))
    fires = rng.random((tokens, width)) < 0.4
    pairs = counted(torch.tensor(rows, dtype=torch.float32), torch.tensor(fires * 1.5), batch).pairs
    alive = [i for i in range(width) if fires[:, i].any()]
    if len(alive) < 2:
        assert len(pairs.latent_A) == 0
        return
    assert pairs.latent_A.tolist() == alive
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for place, i in enumerate(alive):
        j = max((k for k in alive if k != i), key=lambda k: unit[i] @ unit[k])
        assert pairs.neighbor_A[place] == j
        a, b = fires[:, i], fires[:, j]
        both, either = (a & b).sum(), (a | b).sum()
        assert pairs.jaccard_A[place].item() == pytest.approx(both / either)
        assert pairs.neighbor_given_latent_A[place].item() == pytest.approx(both / a.sum())
        assert pairs.latent_given_neighbor_A[place].item() == pytest.approx(both / b.sum())
        if a.std() and b.std():
            assert pairs.phi_A[place].item() == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
        else:
            assert math.isnan(pairs.phi_A[place].item())


def test_fewer_than_two_alive_give_no_figure() -> None:
    found = counted(torch.eye(3), torch.tensor([[1.0, 0, 0]])).metrics()
    assert all(math.isnan(value) for name, value in found.items())


def test_top_tokens_across_batches_and_signs() -> None:
    acts = torch.zeros(10, 2)
    acts[[1, 4, 9], 0] = torch.tensor([2.0, -5.0, 3.0])
    found = counted(torch.eye(2), acts, 4)
    assert found.top_tokens(0, 2) == [(4, -5.0), (9, 3.0)]
    assert found.top_tokens(0, 9) == [(4, -5.0), (9, 3.0), (1, 2.0)]
    assert found.top_tokens(1, 3) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 40), st.floats(-0.9, 0.9))
def test_pairs_at_one_cosine_against_brute_force(seed: int, width: int, tokens: int, cosine: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(width, 4))
    fires = rng.random((tokens, width)) < 0.4
    found = counted(torch.tensor(rows, dtype=torch.float32), torch.tensor(fires * 1.5), 7)
    pairs = found.at_cosine(cosine)
    alive = [i for i in range(width) if fires[:, i].any()]
    if len(alive) < 2:
        assert len(pairs.latent_A) == 0
        return
    assert pairs.latent_A.tolist() == alive
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for place, i in enumerate(alive):
        j = min((k for k in alive if k != i), key=lambda k: abs(unit[i] @ unit[k] - cosine))
        assert pairs.neighbor_A[place] == j
        assert pairs.cosine_A[place].item() == pytest.approx(unit[i] @ unit[j], abs=1e-5)
        a, b = fires[:, i], fires[:, j]
        assert pairs.jaccard_A[place].item() == pytest.approx((a & b).sum() / (a | b).sum())
        if a.std() and b.std():
            assert pairs.phi_A[place].item() == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
    sampled = found.at_cosine(cosine, most=2)
    assert len(sampled.latent_A) == 2
    at = {int(i): int(j) for i, j in zip(pairs.latent_A, pairs.neighbor_A, strict=True)}
    assert all(at[int(i)] == int(j) for i, j in zip(sampled.latent_A, sampled.neighbor_A, strict=True))


def test_the_floor_is_of_as_many_directions_as_the_mean_is_over() -> None:
    acts = torch.zeros(3, 64)
    acts[0, :20] = 1.0
    found = counted(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), acts).metrics()
    assert found["max_cos_random_floor"] == pytest.approx((2 * math.log(20) / 16) ** 0.5)
