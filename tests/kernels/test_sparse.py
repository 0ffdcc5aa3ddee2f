"""Methods without a fixed K on the sparse path: the same losses and gradients as on the dense one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS, ConsistencyConfig
from c2r.training.run import Run
from small_runs import FREE_K

SETTINGS: dict[str, dict[str, Any]] = {
    "jump_relu": {"target_l0": 3, "threshold_init": 0.1, "bandwidth": 0.3},
    "p_anneal": {"p_end": 0.9},  # the gradient of fᵖ at small f multiplies rounding; less so for p near 1
}


def gradients(method: str, shape: tuple[int, int, int], seed: int, bias: float, *, sparse: bool) -> dict[str, Any]:
    """Losses and gradients of one step whose weights are not updated."""
    batch, d_in, width = shape
    config = SECTIONS[method](name="x", width=width, c2r=ConsistencyConfig(strength=0.5), **SETTINGS.get(method, {}))
    run = Run(config, TrainConfig(tokens=100 * batch, batch=batch, precision="float32"), d_in, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in run.sae.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
        run.sae.b_enc += bias  # pyright: ignore[reportAttributeAccessIssue]
        run.sae.W_enc[0] = 0  # a dead latent
    run.step_number = 50  # sparsity is warmed up
    run.activity.share = 0.0 if sparse else 1.0
    run.optimizer.step = run.optimizer.zero_grad = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    measured = run.step(torch.randn(batch, d_in, generator=generator) / d_in**0.5)
    return measured | {name: weight.grad for name, weight in run.sae.named_parameters()}


@pytest.mark.parametrize("method", FREE_K)
@settings(deadline=None, max_examples=12)
@given(
    batch=st.integers(2, 40), d_in=st.integers(2, 9), width=st.integers(4, 90), seed=st.integers(0, 10**6),
    bias=st.sampled_from([0.0, -0.3, -9.0]),
)  # fmt: skip
def test_sparse_equals_dense(method: str, batch: int, d_in: int, width: int, seed: int, bias: float) -> None:
    dense, sparse = (gradients(method, (batch, d_in, width), seed, bias, sparse=s) for s in (False, True))
    for name, value in dense.items():
        assert torch.allclose(sparse[name], value, rtol=1e-4, atol=1e-5, equal_nan=True), name


def test_a_run_takes_the_sparse_path_when_few_latents_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SECTIONS["standard"](name="x", width=200)
    run = Run(config, TrainConfig(tokens=2000, batch=20), 8)
    x = torch.randn(20, 8)
    assert not run.activity.sparse_pays  # nothing is known before the first step
    run.step(x)
    assert not run.activity.sparse_pays
    with torch.no_grad():
        run.sae.b_enc -= 5  # pyright: ignore[reportAttributeAccessIssue]
    run.step(x)
    assert run.activity.sparse_pays
    monkeypatch.setattr(run.encoder, "dense", lambda x: pytest.fail("the dense path was taken"))
    run.step(x)
