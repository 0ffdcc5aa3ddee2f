"""Products in int8 that find candidates: what they miss, and what is selected by them, against full precision."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from c2r.config.run import TrainConfig
from c2r.config.saes import BatchTopKConfig, ConsistencyConfig
from c2r.kernels import int8 as coarse
from c2r.kernels.int8 import coarse_product, coarse_works
from c2r.sae.selection import BatchTopK
from c2r.training.optim import random_unit_rows
from c2r.training.run import Run

right = pytest.mark.skipif(not coarse_works(), reason="this processor's products in int8 saturate, or there are none")


def rows(generator: torch.Generator, count: int, width: int, tail: float) -> Tensor:
    """Rows of different norms, whose entries have the heavier tails the larger `tail` is."""
    normal, norms = (torch.randn(count, size, generator=generator) for size in (width, 1))
    return normal.sign() * normal.abs().pow(tail) * norms.abs().add(0.1)


@right
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(2, 90), st.integers(1, 300), st.sampled_from([1.0, 2.0, 4.0]), st.integers(0, 9))
def test_products_lie_within_the_slack(groups: int, width: int, d_in: int, tail: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, W = rows(generator, 32 * groups, d_in, tail), rows(generator, width, d_in, tail)
    about = coarse_product(x.T.contiguous().T, W)
    assert about is not None
    assert torch.equal(about.tokens_B.sort().values, torch.arange(len(x)))
    exact = W.double() @ x[about.tokens_B].double().T
    # A floor at every product itself, a hair below: none may be lost under it.
    for at, (product_F, exact_F) in enumerate(zip(about.product_FB.T, exact.T, strict=True)):
        floor_FG = about.floor((exact_F - 1e-6 * exact_F.abs()).float())
        assert (product_F > floor_FG[:, at % groups]).all()


@right
@settings(deadline=None, max_examples=40)
@given(st.sampled_from([32, 64, 96, 70]), st.integers(30, 90), st.integers(1, 6), st.integers(0, 10**6))
def test_the_exact_set_is_selected(batch: int, width: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    select = BatchTopK()
    W, bias = rows(generator, width, 48, 1.0), torch.randn(width, generator=generator)
    x = rows(generator, batch, 48, 1.0)
    for _ in range(3):
        x = x + 0.01 * torch.randn(x.shape, generator=generator)
        pre = (x.double() @ W.double().T + bias).float()
        best = pre[pre > 0].sort(descending=True).values[: batch * k]
        found = select.select_coarsely(x, W, bias, k)
        if found is None:
            support = select.select(x @ W.T, bias, k)
            values = pre[support.tokens_N, support.latents_N]
        else:
            support, values = found
        torch.testing.assert_close(values.sort(descending=True).values, best, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, pre[support.tokens_N, support.latents_N], rtol=1e-4, atol=1e-5)
        assert torch.equal(support.tokens_N, support.tokens_N.sort().values)


@right
@pytest.mark.parametrize(("peak", "seed"), [(6.0, 0), (10.0, 0), (10.0, 1)])
def test_the_bound_holds_where_rounding_to_the_nearest_loses_what_counts(
    peak: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of latents' directions, a quarter of them with one coordinate hundreds of times the others."""
    W = random_unit_rows(128, 4096, seed)
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(seed)).pow(8) @ W
    x = torch.nn.functional.normalize(x)
    W[:, 0], x[:16, 0] = 0, peak

    def worst() -> float:
        about = coarse_product(x, W)
        assert about is not None
        error_FB = (about.product_FB - W @ x[about.tokens_B].T / about.unit_F[:, None]).abs()
        return (error_FB / about.slack_FG.repeat(1, 32)).max().item()

    assert worst() < 0.7
    monkeypatch.setattr(coarse, "_dither", lambda d_in: (torch.full((d_in,), 0.5), torch.full((d_in,), 128.5)))
    assert peak < 10 or worst() > 1


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator))
    drawn = (torch.rand(128, 128, generator=generator).pow(16) @ directions for _ in range(count))
    return [x / x.square().sum(1).mean().sqrt() for x in drawn]


def run_of(int8: bool) -> Run[Any]:
    config = BatchTopKConfig(name="x", width=512, k=8, k_anneal=0, c2r=ConsistencyConfig(strength=0.3))
    run = Run(config, TrainConfig(tokens=128 * 40, batch=128, lr=1e-3, precision="float32"), 64)
    run.encoder.int8 = int8
    return run


@right
def test_training_is_that_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    select_coarsely = BatchTopK.select_coarsely

    def counted(*given: Any) -> Any:
        found = select_coarsely(*given)
        used.append(found is not None)
        return found

    monkeypatch.setattr(BatchTopK, "select_coarsely", counted)
    plain, int8 = run_of(False), run_of(True)
    for x in batches(20):
        of_plain, of_int8 = plain.step(x), int8.step(x)
        torch.testing.assert_close(of_int8["loss"], of_plain["loss"], rtol=1e-3, atol=0)
    assert sum(used) > 10


@right
def test_a_resumed_run_goes_on_in_int8_bit_for_bit() -> None:
    whole, parts = run_of(True), run_of(True)
    for x in batches(10):
        whole.step(x)
    for number, x in enumerate(batches(10)):
        if number == 5:
            state = parts.state_dict()
            parts = run_of(False)
            parts.load_state_dict(state)
        parts.step(x)
    assert parts.encoder.int8
    assert torch.equal(whole.sae.W_enc, parts.sae.W_enc)


@right
def test_huge_entries_make_it_rest() -> None:
    generator, select = torch.Generator().manual_seed(0), BatchTopK()
    W, bias = rows(generator, 256, 64, 1.0), torch.zeros(256)
    x = rows(generator, 64, 64, 1.0)
    x[:, 0] = 1e4
    W[:, 0] = 0
    select.select(x @ W.T, bias, 2)
    for _ in range(3):
        assert select.rest == 0
        assert select.select_coarsely(x, W, bias, 2) is None
    assert select.rest == 100
    x[:, 0] = 0
    assert select.select_coarsely(x, W, bias, 2) is None
    assert select.rest == 99
    select.rest = 0
    assert select.select_coarsely(x, W, bias, 2) is not None


@right
@pytest.mark.parametrize("broken", ["half", "inf in W", "no cut"])
def test_what_cannot_be_rounded_is_left_to_others(broken: str) -> None:
    generator, select = torch.Generator().manual_seed(0), BatchTopK()
    x, W, bias = rows(generator, 64, 64, 1.0), rows(generator, 256, 64, 1.0), torch.zeros(256)
    if broken != "no cut":
        select.select(x @ W.T, bias, 2)
    if broken == "half":
        x, W = x.bfloat16(), W.bfloat16()
    elif broken == "inf in W":
        W[3, 5] = torch.inf
    assert select.select_coarsely(x, W, bias, 2) is None


@right
def test_what_one_huge_entry_rounds_off_is_not_lost() -> None:
    """Each token is a latent's direction and an entry so large that plain rounding would leave nothing of the rest."""
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(256, 1024, generator=generator))
    W[:, 0] = 0
    x = W[:64].clone()
    x[:, 0] = 300 * W.abs().max()
    assert (x[:, 1:].abs() < x[:, :1] / 254).all()
    about = coarse_product(x, W)
    assert about is not None
    floor_FG = about.floor(torch.full((256,), 0.99))
    for column, token in enumerate(about.tokens_B.tolist()):
        assert about.product_FB[token, column] > floor_FG[token, column % 2]


def test_a_processor_that_gets_it_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(W_8: Tensor, x_8: Tensor, scale_B: Tensor) -> Tensor:
        return ((W_8.float() - 128) @ x_8.float().T).clamp(-(2**15), 2**15) * scale_B

    def as_it_is(x_8: Tensor, rows: int) -> Tensor:
        return x_8

    def missing(*_: Tensor) -> Tensor:
        raise AttributeError("no such operation")

    monkeypatch.setattr(coarse, "_packed", as_it_is)
    for broken in (saturating, missing):
        monkeypatch.setattr(coarse, "_product_of_8", broken)
        assert not coarse_works.__wrapped__()
