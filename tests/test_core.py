"""Core metrics against closed forms: a mean predictor has EV 0, the identity 1, and so on."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from c2r.config import DataConfig, ModelConfig
from c2r.data.harvest import LanguageModel, load_language_model
from c2r.data.tokens import Rows, packed_rows
from c2r.eval.core import CoreResult, Fidelity, evaluate_core
from c2r.eval.probes import f1_per_class, one_vs_rest_probe
from c2r.eval.results import histogram, write_json
from c2r.sae.base import SAE
from helpers import TEXT, tiny_tokenizer


def fidelity(x: Tensor, x_hat: Tensor, acts: Tensor | None = None, parts: int = 3) -> dict[str, float]:
    """Metrics from uneven batches, so that what is per batch and what is over all tokens differ."""
    acts = torch.ones(len(x), 2) if acts is None else acts
    counted = Fidelity(acts.shape[1], x.shape[1])
    cuts = [0, 1 + len(x) // 10, *[len(x) * i // parts for i in range(1, parts)], len(x)]
    for start, stop in itertools.pairwise(sorted(cuts)):
        counted.add(x[start:stop], x_hat[start:stop], acts[start:stop])
    return counted.metrics()


def data(n: int = 500, d: int = 7) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * torch.arange(1, d + 1) + 5


def test_identity_mean_and_zero_predictors() -> None:
    x = data()
    identity = fidelity(x, x)
    assert identity["explained_variance"] == pytest.approx(1)
    assert (identity["mse"], identity["cossim"], identity["l2_ratio"]) == pytest.approx((0, 1, 1))
    assert identity["relative_reconstruction_bias"] == pytest.approx(1)
    mean = fidelity(x, x.mean(0).expand_as(x))
    assert mean["explained_variance"] == pytest.approx(0, abs=1e-6)
    zero = fidelity(x, torch.zeros_like(x))
    assert zero["fvu"] == pytest.approx((x.square().sum() / (x - x.mean(0)).square().sum()).item())
    assert zero["mse"] == pytest.approx(x.square().sum(1).mean().item())


def test_known_noise_and_shrinkage() -> None:
    x = data(20000)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = 1 - noise.square().sum() / (x - x.mean(0)).square().sum()
    assert fidelity(x, x + noise)["explained_variance"] == pytest.approx(expected.item(), abs=1e-5)
    assert fidelity(x, x + noise)["mse"] == pytest.approx(7, rel=0.02)
    half = fidelity(x, 0.5 * x)
    assert (half["l2_ratio"], half["relative_reconstruction_bias"]) == pytest.approx((0.5, 0.5))
    assert half["cossim"] == pytest.approx(1)


def test_legacy_explained_variance_is_a_mean_over_tokens_within_a_batch() -> None:
    x, x_hat = data(60), data(60) + 1
    expected = []
    for a, b in zip(x.split(30), x_hat.split(30), strict=True):
        expected.append((1 - (a - b).square().sum(1) / (a - a.mean(0)).square().sum(1)).mean().item())
    counted = Fidelity(2, 7)
    for a, b in zip(x.split(30), x_hat.split(30), strict=True):
        counted.add(a, b, torch.ones(30, 2))
    assert counted.metrics()["explained_variance_legacy"] == pytest.approx(sum(expected) / 2)


def test_sparsity_density_and_alive() -> None:
    acts = torch.zeros(100, 4)
    acts[:50, 0] = 2.0
    acts[:5, 1] = 1.0
    acts[0, 2] = 3.0
    found = fidelity(data(100), data(100), acts)
    assert found["l0"] == pytest.approx(0.56)
    assert found["l1"] == pytest.approx(1.08)
    assert found["frac_alive"] == 0.75
    assert found["freq_over_1_percent"] == 0.5
    assert found["freq_over_10_percent"] == 0.25
    assert found["normalized_freq_over_10_percent"] == pytest.approx(50 / 56)


class PassThrough(SAE):
    """An SAE whose reconstruction is x, 0 or any other function of x."""

    def __init__(self, d: int, scale: float) -> None:
        rows = torch.eye(d)
        super().__init__(rows, torch.zeros(d), rows, torch.zeros(d), architecture="standard")
        self.scale = scale

    def encode(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT * 3)
    return list(packed_rows(DataConfig(source="files", path=str(path), context=24), tiny_tokenizer(), rows=4))


@pytest.mark.parametrize("hook", ["resid_post", "mlp_out"])
def test_cross_entropy_and_kl_recovered(tiny_models: dict[str, Path], rows: list[Rows], hook: str) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1, hook=hook))
    saes = {"identity": PassThrough(16, 1.0), "zero": PassThrough(16, 0.0), "half": PassThrough(16, 0.9)}
    with pytest.MonkeyPatch.context() as patch:  # activations come with the clean pass
        patch.setattr(LanguageModel, "activations", None)
        results = evaluate_core(lm, saes, rows)
    behaviour = {
        n: r.core["model_performance_preservation"] | r.core["model_behavior_preservation"] for n, r in results.items()
    }
    assert behaviour["identity"]["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert behaviour["identity"]["kl_div_score"] == pytest.approx(1, abs=1e-6)
    assert behaviour["zero"]["ce_loss_score"] == pytest.approx(0, abs=1e-6)
    assert behaviour["zero"]["kl_div_score"] == pytest.approx(0, abs=1e-6)
    assert behaviour["half"]["kl_div_with_sae"] > 0
    x = torch.cat([lm.activations(part.ids)[part.real] for part in rows])
    lost = 0.01 * x.square().sum() / (x - x.mean(0)).square().sum()
    for name, ev in (("identity", 1), ("half", 1 - lost.item())):
        assert results[name].core["reconstruction_quality"]["explained_variance"] == pytest.approx(ev, abs=1e-5)
    # The clean cross-entropy is the model's own over the positions that count.
    total = count = 0.0
    for part in rows:
        log_p = lm.model(part.ids).logits.log_softmax(-1)
        for r, t in (part.real[:, :-1] & part.real[:, 1:]).nonzero().tolist():
            total -= log_p[r, t, part.ids[r, t + 1]].item()
            count += 1
    assert behaviour["half"]["ce_loss_without_sae"] == pytest.approx(total / count, rel=1e-5)


def test_special_positions_are_left_alone(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    seen: list[Tensor] = []
    original = LanguageModel.logits

    def watch(self: LanguageModel, ids: Tensor, replace=None) -> Tensor:
        if replace is not None:
            before = self.activations(ids)
            seen.append((replace(before) == before).all(-1))
        return original(self, ids, replace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "logits", watch)
        evaluate_core(lm, {"zero": PassThrough(16, 0.0)}, rows[:1])
    clean, *changed = seen
    assert clean.all()
    assert len(changed) == 2
    for kept in changed:
        assert torch.equal(kept, ~rows[0].real)


def test_an_sae_of_another_width_is_refused(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    with pytest.raises(ValueError, match="width 8, the model's have 16"):
        evaluate_core(lm, {"x": PassThrough(8, 1.0)}, rows)


def test_sae_bench_finds_every_key_it_requires(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    result: CoreResult = evaluate_core(lm, {"x": PassThrough(16, 1.0)}, rows)["x"]
    required = {  # SAEBench 0.6.0, evals/core/eval_output.py
        "model_behavior_preservation": {"kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"},
        "model_performance_preservation": {
            "ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae",
        },
        "reconstruction_quality": {"explained_variance", "explained_variance_legacy", "mse", "cossim"},
        "shrinkage": {"l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"},
        "sparsity": {"l0", "l1"},
        "token_stats": {"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"},
        "misc_metrics": {
            "freq_over_1_percent", "freq_over_10_percent", "normalized_freq_over_1_percent",
            "normalized_freq_over_10_percent", "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim",
            "frac_alive",
        },
    }  # fmt: skip
    assert set(result.core) == set(required)
    for category, keys in required.items():
        assert keys <= set(result.core[category])


# The ground-truth probe, and files


def test_probe_finds_planted_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 5
    x = torch.randn(5, 12, generator=generator)[labels] * 3 + 0.3 * torch.randn(400, 12, generator=generator)
    probe = one_vs_rest_probe(x[:300], labels[:300], 5)
    assert (f1_per_class(probe, x[300:], labels[300:]) > 0.97).all()
    noise = torch.randn(400, 12, generator=generator)
    probe = one_vs_rest_probe(noise[:300], labels[:300], 5)
    assert f1_per_class(probe, noise[300:], labels[300:]).mean() < 0.5


def test_the_probe_is_that_of_plain_training() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 9 // 4  # 40, 40 and 10
    x = torch.randn(3, 6, generator=generator)[labels] + torch.randn(90, 6, generator=generator)
    found = one_vs_rest_probe(x, labels, 3, epochs=4, batch=32, seed=7)
    generator.manual_seed(7)
    linear = torch.nn.Linear(6, 3)
    torch.nn.init.zeros_(linear.bias)
    linear.weight.data = 0.01 * torch.randn(3, 6, generator=generator)
    criterion = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([50 / 40, 50 / 40, 80 / 10]))
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=1e-4)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1e-5 / 1e-2) ** (epoch / 4)
        for rows in torch.randperm(90, generator=generator).split(32):
            optimizer.zero_grad()
            criterion(linear(x[rows]), torch.nn.functional.one_hot(labels[rows], 3).float()).backward()
            optimizer.step()
    torch.testing.assert_close(found.weight_CD, linear.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.bias_C, linear.bias.detach(), rtol=1e-4, atol=1e-6)


def test_probe_without_an_example_of_a_class() -> None:
    with pytest.raises(ValueError, match=r"classes \[2\] have no sample"):
        one_vs_rest_probe(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), 3)


def test_json_has_no_nan_and_is_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "x.json", {"a": float("nan"), "b": [1.0, float("inf")]})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"a": None, "b": [1.0, None]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "x.json", {"a": object()})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "a" / "x.json").read_text())["a"] is None


def test_histogram_counts_every_finite_value() -> None:
    counts = histogram(torch.tensor([-5.0, 0.0, 0.49, 0.51, 1.0, 9.0, float("nan"), -math.inf]), 0, 1, bins=2)["counts"]
    assert counts == [3, 3]
