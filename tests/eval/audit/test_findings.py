"""Findings on SAEs built so that they are known."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from c2r.eval.audit import findings as module
from c2r.eval.audit.findings import Finding, count_close_pairs, findings, look
from c2r.sae.model import SAE, Architecture, Extra


def linear_sae(W_dec: Tensor, W_enc: Tensor | None = None, *, architecture: Architecture = "standard") -> SAE:
    """ReLU without biases; what it encodes with is W_dec unless said."""
    width, d_in = W_dec.shape
    extra = Extra(k=2) if architecture == "topk" else Extra()
    enc = W_dec if W_enc is None else W_enc
    return SAE(enc.clone(), torch.zeros(width), W_dec, torch.zeros(d_in), architecture=architecture, extra=extra)


def seen(sae: SAE, x: Tensor) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings(look(sae.requires_grad_(False), x))}


def sparse_data(n: int = 3000, d: int = 40, density: float = 0.05) -> Tensor:
    """Positive, each coordinate seldom on."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(n, d, generator=generator) < density
    return on * (1 + torch.rand(n, d, generator=generator))


def test_a_sound_sae_has_no_mark() -> None:
    found = seen(linear_sae(torch.eye(40)), sparse_data())
    assert not any(finding.marked for finding in found.values())
    assert found["reconstruction"].figures["explained_variance"] == pytest.approx(1)
    assert found["shrinkage"].figures == {"l2_ratio": pytest.approx(1, abs=0.2), "relative_reconstruction_bias": 1}
    assert found["sparsity"].figures["l0"] == pytest.approx(2, rel=0.1)
    assert found["near-duplicates"].figures["pairs_over_0_7"] == 0
    assert found["consistency penalty"].figures["penalty_at_1"] == 0  # every cosine is 0
    assert "3,000 tokens" in found["dead latents"].says
    assert "one token in 1,000" in found["dead latents"].means


def test_a_duplicate_is_found_and_told_from_a_split() -> None:
    x = sparse_data()
    rows = torch.cat([torch.eye(40), torch.eye(40)[:2]])
    rows[41] = torch.nn.functional.normalize(rows[1] + 0.3 * rows[2], dim=0)
    encoder = torch.cat([torch.eye(40), torch.eye(40)[:2]])
    duplicates = seen(linear_sae(rows, encoder), x)
    assert duplicates["near-duplicates"].marked
    assert duplicates["near-duplicates"].figures["pairs_over_0_9"] == 2
    figures = duplicates["co-firing"].figures
    assert (figures["close_firing_together"], figures["close_firing_apart"]) == (4, 0)
    # The same directions, but one of each pair fires on small values and the other on large ones.
    split = linear_sae(rows, encoder)
    with torch.no_grad():
        split.W_enc[[0, 1]] = 0
        split.b_enc[[0, 1]] = 0.5  # on everywhere
        split.W_enc[0, 0], split.W_enc[1, 1] = -1.0, -1.0  # but where 40 and 41 are
    apart = seen(split, x)["co-firing"].figures
    assert (apart["close_firing_together"], apart["close_firing_apart"]) == (0, 4)


def test_dead_dense_short_and_unequal_rows() -> None:
    x = sparse_data()
    rows = torch.eye(40)
    sae = linear_sae(rows.clone(), 0.8 * rows)
    with torch.no_grad():
        sae.b_enc[:6] = -100.0
        sae.b_enc[39] = 1.0
    found = seen(sae, x)
    assert found["dead latents"].figures["share_dead"] == 0.15
    assert found["dead latents"].marked
    assert found["dense latents"].figures["dense"] == 1
    assert found["dense latents"].marked
    assert "densest: 39." in found["dense latents"].says
    shrunk = seen(linear_sae(rows, 0.8 * rows), x)["shrinkage"]
    assert shrunk.figures["relative_reconstruction_bias"] == pytest.approx(0.8)
    assert shrunk.marked
    scaled = seen(linear_sae(2 * rows, rows / 2), x)["decoder norms"]
    assert scaled.figures["decoder_norm_off"] == 1
    assert scaled.marked


def test_worse_than_the_mean_is_said() -> None:
    found = seen(linear_sae(torch.eye(40), 3 * torch.eye(40)), sparse_data())["reconstruction"]
    assert found.marked
    assert "Predicting the mean would do better" in found.means
    nothing = seen(linear_sae(torch.eye(40), -torch.eye(40)), sparse_data())
    assert nothing["sparsity"].marked
    assert math.isnan(nothing["shrinkage"].figures["relative_reconstruction_bias"])
    assert nothing["dead latents"].figures["share_dead"] == 1


def test_an_l0_that_its_file_does_not_ask_for() -> None:
    x = sparse_data(density=0.3)
    found = seen(linear_sae(torch.eye(40), architecture="topk"), x)["sparsity"]
    assert found.figures["l0"] == pytest.approx(2, abs=0.01)
    assert not found.marked
    sae = linear_sae(torch.eye(40))
    sae.config = {"c2r": {"sae": {"k": 5}}}
    found = seen(sae, x)["sparsity"]
    assert found.marked
    assert found.says.endswith("Its file asks for 5.")


def test_the_penalty_against_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = linear_sae(torch.randn(12, 6, generator=generator)).requires_grad_(False)
    x = 3 * torch.randn(4000, 6, generator=generator)  # too few for a second batch
    figures = seen(sae, x)["consistency penalty"].figures
    acts = torch.relu(x @ sae.W_enc.T) / x.square().sum(1).mean().sqrt()
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    rms = acts.square().mean(0).sqrt()
    expected = 0.0
    for i in range(12):
        cosines = [float(unit[i] @ unit[j]) if j != i else -2.0 for j in range(12)]
        j = max(range(12), key=cosines.__getitem__)
        expected += max(cosines[j], 0) ** 2 * float(rms[i] + rms[j]) / math.sqrt(12)
    assert figures["penalty_at_1"] == pytest.approx(expected, rel=1e-5)
    loss = (x - sae(x)).square().sum(1).mean() / x.square().sum(1).mean()
    assert figures["penalty_ratio"] == pytest.approx(0.884 * expected / loss.item(), rel=1e-5)
    # The scale of the activations is no part of it, and for latents that fire often neither is the batch.
    assert seen(sae, 10 * x)["consistency penalty"].figures == pytest.approx(figures, rel=1e-5)
    assert seen(sae, x.repeat(3, 1))["consistency penalty"].figures == pytest.approx(figures, rel=0.01)


def test_batches_of_the_penalty_hold_every_token_once() -> None:
    x = sparse_data(10_000)
    found = look(linear_sae(torch.eye(40)).requires_grad_(False), x)
    assert found.size_G.tolist() == [2500] * 4
    torch.testing.assert_close(found.norm_GF.square().sum(0), x.square().sum(0))


@pytest.mark.parametrize("tile", [2, 5, 64])
def test_close_pairs_against_brute_force(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    rows = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = [float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(23), 2)]
    expected = [sum(cosine > t for cosine in cosines) for t in (0.0, 0.7, 0.9)]
    assert count_close_pairs(rows, (0.0, 0.7, 0.9)) == expected
    assert min(expected) > 0
    assert count_close_pairs(rows[:1], (0.0,)) == [0]


def test_weights_that_are_not_finite() -> None:
    sae = linear_sae(torch.eye(4))
    with torch.no_grad():
        sae.W_enc[0, :3] = math.nan
    with pytest.raises(ValueError, match="W_enc: 3 of 16 numbers are not finite"):
        look(sae, torch.ones(2, 4))
