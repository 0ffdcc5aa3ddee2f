"""The penalty against brute force, gradcheck, and the edges where published code breaks."""

import math

import pytest
import torch
from torch import Tensor

from c2r.kernels.codes import from_dense, norms
from c2r.neighbors import nearest_neighbors
from c2r.penalty import consistency_penalty, lambda_of_strength, pair_cosines, penalty_from_norms, strength_of_lambda


def brute_force(acts: Tensor, decoder: Tensor, alpha: float, margin: float = 0.0) -> float:
    """The paper's formula, latent by latent, in plain Python numbers."""
    rows, columns = decoder.double().tolist(), acts.double().T.tolist()
    total = 0.0
    for i, a in enumerate(rows):
        cosines = [
            -math.inf if i == j else sumprod(a, b) / (math.hypot(*a) * math.hypot(*b)) for j, b in enumerate(rows)
        ]
        j = max(range(len(rows)), key=cosines.__getitem__)
        weight = math.hypot(*columns[i]) + math.hypot(*columns[j])
        total += max(0.0, cosines[j] - margin) ** 2 * weight**alpha
    return total / len(rows)


def sumprod(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def example(seed: int, batch: int = 7, width: int = 11, d_in: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(batch, width, generator=generator, dtype=torch.double).relu()
    acts[:, 3] = 0
    return acts, torch.randn(width, d_in, generator=generator, dtype=torch.double)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(alpha: float, margin: float, seed: int) -> None:
    acts, decoder = example(seed)
    expected = brute_force(acts, decoder, alpha, margin)
    assert consistency_penalty(acts, decoder, alpha=alpha, margin=margin).item() == pytest.approx(expected, rel=1e-12)
    codes = from_dense(acts)
    assert consistency_penalty(codes, decoder, alpha=alpha, margin=margin).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_gradient_is_that_of_the_formula(alpha: float) -> None:
    acts, decoder = example(1)
    acts[:, 3] = 1.0  # the square root has no gradient at a silent latent; that is tested below
    acts.requires_grad_()
    decoder.requires_grad_()
    neighbors = nearest_neighbors(decoder).index
    for given in (None, neighbors):
        torch.autograd.gradcheck(
            lambda a, d, n=given: consistency_penalty(a, d, alpha=alpha, margin=0.1, neighbors=n), (acts, decoder)
        )
        torch.autograd.gradcheck(
            lambda a, d, n=given: consistency_penalty(from_dense(a), d, alpha=alpha, neighbors=n), (acts, decoder)
        )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("sparse", [False, True])
def test_silent_pairs_have_gradient_zero(alpha: float, sparse: bool) -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.5]], requires_grad=True)
    acts = torch.zeros(4, 3, requires_grad=True)
    consistency_penalty(from_dense(acts) if sparse else acts, decoder, alpha=alpha).backward()
    assert acts.grad is None or torch.equal(acts.grad, torch.zeros_like(acts))
    assert decoder.grad is not None
    assert torch.isfinite(decoder.grad).all()
    if alpha > 0:
        assert torch.equal(decoder.grad, torch.zeros_like(decoder))
    else:  # OrtSAE's penalty presses on the angle whether or not the pair fires
        assert decoder.grad[:2].abs().sum() > 0


def test_one_of_a_pair_firing_alone_is_enough() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, -1.0]])
    acts = torch.zeros(4, 3)
    acts[:, 0] = 1.0  # ‖f_0‖ = 2; latents 0 and 1 are each other's neighbour at cosine 0.8; 2 has none above 0
    assert consistency_penalty(acts, decoder).item() == pytest.approx((0.64 * 2 + 0.64 * 2) / 3)


def test_a_zero_row_is_no_neighbour() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8]], requires_grad=True)
    loss = consistency_penalty(torch.ones(4, 3), decoder)
    assert loss.item() == pytest.approx(2 * 0.36 * 4 / 3)
    loss.backward()
    assert decoder.grad is not None
    assert torch.isfinite(decoder.grad).all()


def test_ties_count_one_neighbour() -> None:
    decoder = torch.eye(4)  # every cosine is 0
    assert consistency_penalty(torch.ones(2, 4), decoder).item() == 0
    same = torch.ones(4, 3)
    assert consistency_penalty(torch.ones(1, 4), same).item() == pytest.approx(2.0)


def test_a_latent_that_is_its_own_neighbour_contributes_nothing() -> None:
    decoder = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert consistency_penalty(torch.ones(1, 2), decoder, neighbors=torch.tensor([0, 1])).item() == 0


def test_neighbours_may_be_int32_and_strided() -> None:
    acts, decoder = example(1)
    index = nearest_neighbors(decoder).index
    strided = torch.stack([index, index], 1).int()[:, 0]
    assert consistency_penalty(acts, decoder, neighbors=strided) == consistency_penalty(acts, decoder, neighbors=index)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6.0), (torch.float16, 2e-4), (torch.bfloat16, 3.0)])
def test_half_precision_neither_overflows_nor_vanishes(dtype: torch.dtype, size: float) -> None:
    acts = torch.full((2048, 11), size, dtype=dtype)
    decoder = example(0)[1].to(dtype)
    expected = consistency_penalty(acts.double(), decoder.double()).item()
    assert consistency_penalty(acts, decoder).item() == pytest.approx(expected, rel=1e-4)
    assert consistency_penalty(from_dense(acts), decoder).item() == pytest.approx(expected, rel=1e-4)


def test_scale_of_decoder_rows_does_not_matter() -> None:
    acts, decoder = example(2)
    scaled = decoder * torch.rand(len(decoder), 1, dtype=torch.double).add(0.1)
    assert consistency_penalty(acts, scaled).item() == pytest.approx(consistency_penalty(acts, decoder).item())


def test_low_rank_of_the_gradient_reaches_both_partners() -> None:
    decoder = torch.tensor([[1.0, 0.0], [0.9, 0.2], [0.0, -1.0]], requires_grad=True)
    pair_cosines(decoder, torch.tensor([1, 0, 0]))[0].backward()
    assert decoder.grad is not None
    assert decoder.grad[0].abs().sum() > 0
    assert decoder.grad[1].abs().sum() > 0
    assert decoder.grad[2].abs().sum() == 0


def test_cosines_that_are_known_change_neither_value_nor_gradient() -> None:
    acts, decoder = example(4)
    near = nearest_neighbors(decoder)
    found = []
    for known in (None, near.cosine):
        weight = decoder.clone().requires_grad_()
        loss = penalty_from_norms(norms(acts), weight, near.index, known)
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
        found.append((loss.detach(), weight.grad))
    for computed, taken in zip(*found, strict=True):
        torch.testing.assert_close(taken, computed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_strength_is_the_dimensionless_form(alpha: float) -> None:
    acts, decoder = example(3)
    batch, width = acts.shape
    neighbors = nearest_neighbors(decoder).index
    rms = acts.square().mean(0).sqrt()
    c = pair_cosines(decoder, neighbors).relu().square()
    expected = 0.7 * width ** (alpha / 2 - 1) * (c * (rms + rms[neighbors]) ** alpha).sum()
    lam = lambda_of_strength(0.7, batch=batch, width=width, alpha=alpha)
    assert (lam * consistency_penalty(acts, decoder, alpha=alpha)).item() == pytest.approx(expected.item())
    assert strength_of_lambda(lam, batch=batch, width=width, alpha=alpha) == pytest.approx(0.7)


def test_published_strength() -> None:
    assert strength_of_lambda(5.0, batch=2048, width=65536) == pytest.approx(0.884, abs=5e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoder": torch.ones(3, 8)}, r"one row for each of the 8 latents.*transposed"),
        ({"decoder": torch.ones(6, 3)}, "one row for each of the 8 latents"),
        ({"decoder": torch.ones(8)}, r"expected floating-point \[F, D\]"),
        ({"decoder": torch.ones(8, 3, dtype=torch.long)}, "floating-point"),
        ({"acts": torch.ones(2, 1), "decoder": torch.ones(1, 3)}, "F ≥ 2"),
        ({"acts": torch.ones(8)}, r"expected \[B, F\]"),
        ({"alpha": -1.0}, "alpha"),
        ({"margin": 1.0}, "margin"),
        ({"neighbors": torch.zeros(7, dtype=torch.long)}, r"integers \[8\]"),
        ({"neighbors": torch.zeros(8)}, "integers"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_named(change: dict[str, object], says: str) -> None:
    given: dict[str, object] = {"acts": torch.ones(2, 8), "decoder": torch.eye(8)[:, :3] + 1} | change
    acts, decoder = given.pop("acts"), given.pop("decoder")
    with pytest.raises(ValueError, match=says):
        consistency_penalty(acts, decoder, **given)
