"""Folding decoder norms leaves an SAE's function as it is, whatever its architecture; so do saving and loading."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from c2r.config.run import TrainConfig
from c2r.config.saes import SECTIONS
from c2r.eval.audit.findings import findings, look
from c2r.interop.saelens import load_sae, save_sae
from c2r.sae.model import SAE, Architecture, Extra
from c2r.training.optim import at_unit_norm
from c2r.training.run import Run

D, F, B = 6, 11, 40
ARCHITECTURES: tuple[Architecture, ...] = ("standard", "jumprelu", "topk", "abs_topk", "gated")


def random_sae(architecture: Architecture, norms: torch.Tensor, seed: int, *, subtract: bool = True) -> SAE:
    """Random weights whose decoder rows have these norms; all extras that the architecture has are in play."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1) * norms[:, None]
    extra = {
        "standard": Extra(),
        "jumprelu": Extra(threshold=torch.rand(F, generator=g)),
        "topk": Extra(k=3),
        "abs_topk": Extra(k=3),
        "gated": Extra(r_mag=torch.randn(F, generator=g) / 3, b_mag=torch.randn(F, generator=g)),
    }[architecture]
    return SAE(
        torch.randn(F, D, generator=g) / norms.clamp(min=0.1)[:, None], torch.randn(F, generator=g) / 3, W_dec,
        torch.randn(D, generator=g), architecture=architecture, extra=extra, subtract_b_dec=subtract,
    ).requires_grad_(False)  # fmt: skip


norms_of_rows = st.lists(st.floats(0.1, 10) | st.just(0.0) | st.just(1.0), min_size=F, max_size=F).map(torch.tensor)


def same_function(one: SAE, other: SAE, norms: torch.Tensor) -> None:
    """Both reconstruct alike, the same latents fire, and `other`'s activations are `one`'s times the norms."""
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(5)) * 2
    acts, others = one.encode(x), other.encode(x)
    scale = one(x).abs().max() + 1
    torch.testing.assert_close(other(x) / scale, one(x) / scale, rtol=0, atol=1e-5)
    assert torch.equal(acts != 0, others != 0)
    torch.testing.assert_close(others, acts * norms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(norms=norms_of_rows, seed=st.integers(0, 2**20), subtract=st.booleans())
@settings(max_examples=25, deadline=None)
def test_folding_keeps_the_function(architecture: Architecture, norms: torch.Tensor, seed: int, subtract: bool) -> None:
    sae = random_sae(architecture, norms, seed, subtract=subtract)
    folded = sae.with_unit_rows()
    grown = torch.where(norms > 0, norms, 1.0)
    same_function(sae, folded, grown)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), (norms > 0).float())
    assert folded.with_unit_rows() is folded
    plain = folded.with_plain_ranking()
    assert plain.rank is None
    same_function(sae, plain, grown if folded.rank is None else grown * folded.rank)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(norms=norms_of_rows, seed=st.integers(0, 2**20))
@settings(max_examples=8, deadline=None)
def test_a_saved_folder_computes_what_was_saved(
    architecture: Architecture, norms: torch.Tensor, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sae = random_sae(architecture, norms, seed)
    folder = tmp_path_factory.mktemp("sae") / "a"
    for version in (sae, sae.with_unit_rows()):
        save_sae(version, folder, metadata={}, c2r={})
        x = torch.randn(B, D, generator=torch.Generator().manual_seed(6))
        torch.testing.assert_close(load_sae(folder)(x), sae(x), rtol=1e-4, atol=1e-4)


def test_the_ranking_follows_the_norms_only_as_far_as_it_did_before() -> None:
    """By hand: latent 1 has the larger pre-activation, latent 0 the larger contribution."""
    sae = SAE(
        torch.tensor([[1.0], [2.0]]), torch.zeros(2), torch.tensor([[10.0], [1.0]]), torch.zeros(1),
        architecture="topk", extra=Extra(k=1),
    ).requires_grad_(False)  # fmt: skip
    assert sae.encode(torch.ones(1, 1)).tolist() == [[0.0, 2.0]]
    assert sae.with_unit_rows().encode(torch.ones(1, 1)).tolist() == [[0.0, 2.0]]
    # What is trained at unit norm would choose the other: the norm has become part of the pre-activation.
    unranked = SAE(*(sae.with_unit_rows().state_dict()[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")),
                   architecture="topk", extra=Extra(k=1)).requires_grad_(False)  # fmt: skip
    assert unranked.encode(torch.ones(1, 1)).tolist() == [[10.0, 0.0]]


@pytest.mark.parametrize("architecture", ["topk", "abs_topk"])
def test_choice_by_contribution_as_saelens_asks_for_it(architecture: Architecture, tmp_path: Path) -> None:
    """`rescale_acts_by_decoder_norm`: the k largest of pre-activation · norm, decoded by the rows divided by it."""
    norms = torch.logspace(-1, 1, F)
    sae = random_sae(architecture, norms, 3)
    save_file(
        {"W_enc": sae.W_enc.T.contiguous(), "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec},
        tmp_path / "sae_weights.safetensors",
    )
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "k": 3, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * norms
    strength = pre.abs() if architecture == "abs_topk" else pre.relu()
    kept = pre * (strength >= strength.topk(3).values[:, -1:]) * (strength > 0)
    expected = kept @ (sae.W_dec / norms[:, None]) + sae.b_dec
    loaded = load_sae(tmp_path)
    torch.testing.assert_close(loaded.encode(x), kept, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loaded(x), sae(x), atol=1e-2)  # so the choice was another


def test_the_audit_reads_the_same_sae_alike_and_shows_the_norms_of_the_file() -> None:
    norms = torch.logspace(-1, 1, F)
    sae, x = random_sae("standard", norms, 4), torch.randn(400, D, generator=torch.Generator().manual_seed(2))
    unit = sae.with_unit_rows()
    plain = SAE(*(unit.state_dict()[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), architecture="standard")
    figures = [
        {key: value for finding in findings(look(one, x)) for key, value in finding.figures.items()}
        for one in (unit, plain.requires_grad_(False))
    ]
    assert figures[0].pop("decoder_norm_off") == pytest.approx(9, rel=1e-4)
    assert figures[1].pop("decoder_norm_off") < 1e-5
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "more"),
    [("standard", {"l1": 0.0}), ("p_anneal", {"l1": 0.0}), ("jump_relu", {"target_l0": 3, "sparsity_coefficient": 0.0}),
     ("gated", {"l1": 0.0}), ("batch_top_k", {"k": 3, "k_anneal": 0}), ("april_update", {"l1": 0.0})],
)  # fmt: skip
def test_training_begins_with_what_the_sae_does(method: str, more: dict[str, float]) -> None:
    """Steps of next to no size leave what the SAE does, whose rows have other norms than training holds."""
    architecture = {"jump_relu": "jumprelu", "gated": "gated"}.get(method, "standard")
    norms = torch.logspace(-0.7, 0.7, F)
    start = random_sae(architecture, norms, 7, subtract=method != "jump_relu").requires_grad_(True)  # pyright: ignore
    config = SECTIONS[method].model_validate({"name": "x", "method": method, "width": F, **more})
    train = TrainConfig(tokens=100 * B, batch=B, lr=1e-12, precision="float32", warmup_steps=0)
    run = Run(config, train, D, start=start)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(8))
    before = start(x)
    for _ in range(3):
        run.step(x)
    if method != "batch_top_k":  # which chooses among what the SAE emits
        torch.testing.assert_close(run.sae(x), before, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(run.sae.pre_activations(x), start.pre_activations(x) * norms, rtol=1e-4, atol=1e-4)
    if method == "april_update":
        torch.testing.assert_close(run.sae.W_dec.norm(dim=1), norms)
    else:
        torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(F))


def test_a_row_of_zeros_is_started_afresh_without_changing_the_rest() -> None:
    norms = torch.ones(F)
    norms[3] = 0
    sae = random_sae("gated", norms, 9)
    started, x = at_unit_norm(sae, 0), torch.randn(B, D, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(started.W_dec.norm(dim=1), torch.ones(F))
    kept = torch.arange(F) != 3
    assert torch.equal(started.encode(x)[:, kept], sae.encode(x)[:, kept])
    assert (started(x) - sae(x)).norm(dim=1).max() < 0.05 * sae(x).norm(dim=1).min()
    config = SECTIONS["gated"].model_validate({"name": "x", "method": "gated", "width": F})
    run = Run(
        config, TrainConfig(tokens=100 * B, batch=B, lr=1e-3, precision="float32"), D, start=sae.requires_grad_(True)
    )
    for _ in range(3):
        run.step(x)
    assert all(bool(weight.isfinite().all()) for weight in run.sae.parameters())
