"""JumpReLU: its gradients against closed forms and finite differences of the smoothed objective, thresholds ≥ 0."""

from typing import Any

import pytest
import torch
from torch import Tensor

from c2r.config.run import TrainConfig
from c2r.config.saes import JumpReLUConfig
from c2r.kernels.codes import Codes, from_dense, to_dense
from c2r.losses import Forward
from c2r.sae.jumprelu import jump_relu, published_soft_l0, soft_l0
from c2r.sae.model import SAE, Extra
from c2r.training.run import Run

TARGET = 4.0


def test_gradients_by_hand() -> None:
    pre = torch.tensor([[0.45, 0.55, 2.0, -1.0]], requires_grad=True)
    threshold = torch.full((4,), 0.5, requires_grad=True)
    acts = jump_relu(pre, threshold, 0.2)
    assert acts.tolist() == [[0, pytest.approx(0.55), 2, 0]]
    acts.sum().backward()
    assert pre.grad is not None
    assert threshold.grad is not None
    assert pre.grad.tolist() == [[0, 1, 1, 0]]
    assert threshold.grad.tolist() == pytest.approx([-2.5, -2.5, 0, 0])  # −θ/ε inside the rectangle


@pytest.mark.parametrize("sparse", [False, True])
def test_l0_gradient_by_hand(sparse: bool) -> None:
    """Of what training shows it: pre-activations in the paper's form, activations in the published one."""
    pre = torch.tensor([[0.45, 0.55, 2.0, -1.0], [0.0, 0.6, 0.05, 0.3]])
    threshold = torch.tensor([0.5, 0.5, 0.5, 0.05], requires_grad=True)
    acts = jump_relu(pre, threshold, 0.2).detach()

    def gradient(count: Any, values: Tensor) -> list[float]:
        near = values > threshold - 0.1  # what the sparse path keeps
        kept = from_dense(torch.where(near, values, 0.0)) if sparse else values
        threshold.grad = None
        l0 = count(kept, threshold, 0.2)
        assert l0.item() == (1 + 2 + 1) / 2
        l0.backward()
        assert threshold.grad is not None
        return threshold.grad.tolist()

    assert gradient(soft_l0, pre) == pytest.approx([-2.5, -2.5, 0, 0])  # −1/ε · 1 of 2 tokens
    # 0.45 is silent, so not near; silent entries of the last latent are near its threshold, which is less than ε/2.
    assert gradient(published_soft_l0, acts) == pytest.approx([0, -2.5, 0, -2.5])


def run_of(threshold: float, l0_gradient: str = "paper", lr: float = 1e-3, **changes: Any) -> Run[Any]:
    settings = {"target_l0": TARGET, "bandwidth": 0.05, "threshold_init": threshold, "sparsity_warmup_steps": 0}
    config = JumpReLUConfig.model_validate(
        {"name": "x", "width": 48, "l0_gradient": l0_gradient, **(settings | changes)}
    )
    return Run(config, TrainConfig(tokens=10**5, batch=2048, precision="float32", lr=lr, warmup_steps=0), 16)


def rows(count: int = 2048, seed: int = 0) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) / 4


def l0_term_and_gradient(run: Run[Any], x: Tensor) -> tuple[float, Tensor]:
    forward = Forward(run.sae, x, run.method.encode(run.seen(x)), run.activity.dead_F)
    term = run.method.terms["l0"](run.seen(x), forward)
    (gradient,) = torch.autograd.grad(term, run.sae.threshold)
    return term.item(), gradient


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.01])
def test_the_l0_terms_gradient_is_that_of_the_smoothed_objective(threshold: float, sparse: bool) -> None:
    """The rectangle is the derivative of a ramp of width ε; the ramp's own derivative is taken by differences."""
    run, x = run_of(threshold), rows()
    run.activity.share = 0.0 if sparse else 1.0
    assert isinstance(run.method.encode(run.seen(x)).acts, Codes) == sparse
    term, gradient = l0_term_and_gradient(run, x)
    pre = run.sae.pre_activations(x).detach().double()
    thresholds = run.sae.threshold.detach().double()
    l0 = (pre > thresholds).double().sum(1).mean()
    assert term == pytest.approx(((l0 / TARGET - 1) ** 2).item(), rel=1e-5)

    def smoothed(moved: Tensor) -> Tensor:
        return ((pre - moved) / 0.05 + 0.5).clamp(0, 1).mean(0)

    step = 1e-6
    slope = (smoothed(thresholds + step) - smoothed(thresholds - step)) / (2 * step)
    expected = 2 * (l0 / TARGET - 1) / TARGET * slope
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_the_published_form_is_another() -> None:
    x = rows()
    of_paper, published = (l0_term_and_gradient(run_of(0.3, form), x) for form in ("paper", "published"))
    assert of_paper[0] == published[0]
    assert 0.3 < (published[1].sum() / of_paper[1].sum()).item() < 0.6  # the upper half of the rectangle alone
    of_paper, published = (l0_term_and_gradient(run_of(0.01, form), x)[1].sum() for form in ("paper", "published"))
    assert (published / of_paper).item() > 3  # every silent entry counts as near


def test_thresholds_stay_at_zero_or_above_and_training_encodes_as_inference_does() -> None:
    run = run_of(1e-3, lr=3e-3, target_l0=40, bandwidth=0.1)  # more than fire: thresholds are drawn down at first
    x, lowest = rows(256, seed=99), []
    for step in range(20):
        run.step(rows(512, seed=step))
        assert run.sae.threshold is not None
        lowest.append(run.sae.threshold.min().item())
        acts = to_dense(run.method.encode(run.seen(x)).acts)
        assert (acts >= 0).all()
        torch.testing.assert_close(acts, run.export().encode(x), rtol=1e-5, atol=1e-6)
    assert min(lowest) == 0


def test_a_start_with_thresholds_below_zero_keeps_its_function() -> None:
    generator = torch.Generator().manual_seed(0)
    W, threshold = torch.randn(48, 16, generator=generator), torch.linspace(-0.5, 0.5, 48)
    start = SAE(
        W.clone(), torch.zeros(48), W / W.norm(dim=1, keepdim=True), torch.zeros(16), architecture="jumprelu",
        extra=Extra(threshold=threshold.clone()), subtract_b_dec=False,
    )  # fmt: skip
    x = rows(256)
    before = start.encode(x).detach()
    config = JumpReLUConfig(name="x", width=48, target_l0=4)
    run = Run(config, TrainConfig(tokens=10**5, batch=2048, precision="float32"), 16, start=start)
    assert run.sae.threshold is not None
    assert torch.equal(run.sae.threshold.data, threshold.clamp(min=0))
    assert torch.equal(run.export().encode(x), before)
    torch.testing.assert_close(to_dense(run.method.encode(run.seen(x)).acts), before)
