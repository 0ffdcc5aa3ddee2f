"""Core metrics against closed forms: a mean predictor has EV 0, the identity 1, and so on.

One file above 400 lines: all of it measures one evaluation on the same few hand-made SAEs.
"""

import io
import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from builders import TEXT, bench_of, tiny_tokenizer
from c2r.config.load import parse_config
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval import fidelity as fidelity_module
from c2r.eval.absorption.probes import f1_per_class, one_vs_rest_probe
from c2r.eval.bench import Bench
from c2r.eval.core import CoreResult, evaluate_core, run_core
from c2r.eval.fidelity import Fidelity
from c2r.eval.results import histogram, write_json
from c2r.interop.saelens import load_sae
from c2r.language_model import passes
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.sae.model import SAE, Extra
from c2r.text.packing import Rows, packed_rows
from c2r.training.trainer import train


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


def jump_relu(seed: int, max_norm: float | None = None) -> SAE:
    """A random SAE of 40 latents that reads 16, and the largest norm that its training kept."""
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(40, 16, generator=generator) / 4 for _ in range(2))
    biases = torch.randn(40, generator=generator) / 4, torch.randn(16, generator=generator) / 4
    config = {} if max_norm is None else {"c2r": {"state": {"max_norm": max_norm}}}
    extra = Extra(threshold=torch.full((40,), 0.3))
    return SAE(W_enc, biases[0], W_dec, biases[1], architecture="jumprelu", extra=extra, config=config)


def norms_of(lm: LanguageModel, rows: list[Rows]) -> Tensor:
    return torch.cat([lm.activations(part.ids)[part.real] for part in rows]).norm(dim=1)


def plain_core(lm: LanguageModel, sae: SAE, rows: list[Rows], max_norm: float) -> dict[str, float]:
    """By whole logits of whole passes, dense codes and float64, for one SAE."""
    ce, kl, kept_x, kept_x_hat, kept_acts = Counter[str](), Counter[str](), [], [], []
    for part in rows:
        hidden = lm.activations(part.ids)
        usual = part.real & (hidden.norm(dim=-1) <= max_norm)
        kept_x.append(hidden[usual].double())
        kept_acts.append(sae.encode(hidden[usual]).double())
        kept_x_hat.append(sae(hidden[usual]).double())
        replaced = {"clean": hidden, "zero": hidden.clone(), "sae": hidden.clone()}
        replaced["zero"][usual] = 0
        replaced["sae"][usual] = sae(hidden[usual])
        log_p = {n: lm.logits(part.ids, lambda _, h=h: h).double().log_softmax(-1) for n, h in replaced.items()}
        followed = part.real[:, :-1] & part.real[:, 1:]
        ce["count"] += int(followed.sum())
        for name, log in log_p.items():
            kl[name] += (log_p["clean"].exp() * (log_p["clean"] - log)).sum(-1)[part.real].sum().item()
            ce[name] -= log[:, :-1][followed].gather(1, part.ids[:, 1:][followed][:, None]).sum().item()
    x, x_hat, acts = (torch.cat(parts) for parts in (kept_x, kept_x_hat, kept_acts))
    count, positions = ce["count"], sum(int(part.real.sum()) for part in rows)
    return {
        "kl_div_with_sae": kl["sae"] / positions,
        "kl_div_with_ablation": kl["zero"] / positions,
        "ce_loss_with_sae": ce["sae"] / count,
        "ce_loss_with_ablation": ce["zero"] / count,
        "ce_loss_without_sae": ce["clean"] / count,
        "explained_variance": 1 - ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(),
        "mse": (x - x_hat).square().sum(1).mean().item(),
        "cossim": torch.nn.functional.cosine_similarity(x, x_hat).mean().item(),
        "l0": (acts != 0).sum(1).double().mean().item(),
        "l1": acts.abs().sum(1).mean().item(),
        "frac_alive": (acts != 0).any(0).double().mean().item(),
        "total_tokens_eval_sparsity_variance": len(x),
    }


def figures_of(result: CoreResult) -> dict[str, float]:
    categories = {name: figures for name, figures in result.core.items() if name != "with_outliers"}
    return {name: value for figures in categories.values() for name, value in figures.items()}


@pytest.mark.parametrize("hook", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2", "qwen3"])
def test_every_figure_is_that_of_plain_code(
    family: str, hook: str, tiny_models: dict[str, Path], rows: list[Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_PIECE", {"cpu": 7 * 300})
    monkeypatch.setattr(passes, "_SMALLEST_PIECE", 1)
    monkeypatch.setattr(fidelity_module, "_PIECE", {"cpu": 9 * 40})
    lm = load_language_model(ModelConfig(name=str(tiny_models[family]), layer=1, hook=hook))
    norms = norms_of(lm, rows)
    limits = {"all": math.inf, "most": norms.quantile(0.9).item(), "half": norms.median().item()}
    saes = {name: jump_relu(0, None if limit == math.inf else limit) for name, limit in limits.items()}
    results = evaluate_core(lm, saes, rows)
    expected = {name: plain_core(lm, saes[name], rows, limit) for name, limit in limits.items()}
    everything = expected["all"]  # the three are the same SAE
    for name, limit in limits.items():
        for figure, value in expected[name].items():
            assert figures_of(results[name])[figure] == pytest.approx(value, rel=2e-6, abs=1e-9), (name, figure)
        every = results[name].core["with_outliers"]
        assert every["total_tokens"] == len(norms)
        assert every["outlier_tokens"] == (norms > limit).sum()
        for figure in ("explained_variance", "mse", "cossim", "l0", "l1", "frac_alive"):
            assert every[figure] == pytest.approx(everything[figure], rel=2e-6)
    assert results["all"].core["with_outliers"]["outlier_tokens"] == 0
    assert results["half"].core["with_outliers"]["outlier_tokens"] > 0


def test_a_result_does_not_depend_on_the_other_saes(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    middle = norms_of(lm, rows).median().item()
    saes = {"a": jump_relu(1), "b": jump_relu(2, middle), "c": jump_relu(3, middle), "d": PassThrough(16, 0.5)}
    together = evaluate_core(lm, saes, rows)
    assert evaluate_core(lm, dict(reversed(saes.items())), rows) == together
    for name, sae in saes.items():
        assert evaluate_core(lm, {name: sae}, rows)[name] == together[name]


def test_a_result_does_not_depend_on_the_batches(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["gpt2"]), layer=1))
    saes = {"a": jump_relu(1, norms_of(lm, rows).median().item())}
    one, other = (
        evaluate_core(lm, saes, parts)["a"]
        for parts in (rows, [Rows(*pair) for part in rows for pair in zip(part.ids.split(1), part.real.split(1))])  # noqa: B905
    )
    for category, figures in one.core.items():
        for name, value in figures.items():
            if name != "explained_variance_legacy":  # is a mean over batches by definition
                assert other.core[category][name] == pytest.approx(value, rel=2e-6, abs=1e-9), name
    assert one.density == other.density


@pytest.mark.parametrize(
    ("limits", "ablations"), [((None, None), 1), ((0.5, 0.5), 1), ((0.5, 0.7), 2), ((None, 9.0), 1)]
)
def test_saes_with_the_same_outliers_share_the_ablation(
    tiny_models: dict[str, Path], rows: list[Rows], limits: tuple[float | None, ...], ablations: int
) -> None:
    """Limits are in units of the largest norm."""
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    largest = norms_of(lm, rows[:1]).max().item()
    saes = {f"{i}": jump_relu(i, limit and limit * largest) for i, limit in enumerate(limits)}
    with pytest.MonkeyPatch.context() as patch:
        ran, final = [], passes.Pass.final
        patch.setattr(passes.Pass, "final", lambda self, hidden: ran.append(hidden) or final(self, hidden))
        patch.setattr(passes.Passes, "_test_skipping", lambda *_: None)
        evaluate_core(lm, saes, rows[:1])
    assert len(ran) == len(saes) + ablations


def test_special_positions_and_outliers_are_left_alone(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    hidden, real = lm.activations(rows[0].ids), rows[0].real
    limit = hidden[real].norm(dim=1).median().item()
    usual = real & (hidden.norm(dim=-1) <= limit)
    changed: list[Tensor] = []
    final = passes.Pass.final

    def watch(self: passes.Pass, hidden_RTD: Tensor) -> Tensor:
        changed.append((hidden_RTD != self.hidden_RTD).any(-1))
        return final(self, hidden_RTD)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.Pass, "final", watch)
        patch.setattr(passes.Passes, "_test_skipping", lambda *_: None)
        evaluate_core(lm, {"all": jump_relu(0), "usual": jump_relu(1, limit)}, rows[:1])
    spliced_all, zeroed_all, spliced_usual, zeroed_usual = changed
    assert torch.equal(spliced_all, real)
    assert torch.equal(zeroed_all, real)
    assert torch.equal(spliced_usual, usual)
    assert torch.equal(zeroed_usual, usual)
    assert 0 < usual.sum() < real.sum()


def test_an_sae_for_which_every_token_is_an_outlier_fails(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    failed: dict[str, Exception] = {}
    results = evaluate_core(lm, {"none": jump_relu(0, 1e-3), "all": jump_relu(1)}, rows, failed=failed)
    assert set(results) == {"all"}
    assert "tokens are outliers" in str(failed["none"])
    with pytest.raises(ValueError, match=r"all \d+ tokens are outliers: their norms exceed 0.001"):
        evaluate_core(lm, {"none": jump_relu(0, 1e-3)}, rows)


def test_what_a_model_does_not_allow_is_said_and_changes_nothing(
    tiny_models: dict[str, Path], rows: list[Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1))
    expected, said = evaluate_core(lm, {"a": jump_relu(0)}, rows, say=pytest.fail), []
    monkeypatch.setattr(passes.Passes, "_difference", lambda *_: "made up")
    monkeypatch.setattr(passes, "_WHOLE", 2 * 24 * 300)
    found = evaluate_core(lm, {"a": jump_relu(0)}, rows, say=said.append)
    assert [note.split(" (made up)")[0] for note in said] == [
        "the output head of LlamaForCausalLM cannot be run on a few positions",
        "LlamaForCausalLM cannot be run from the hook onwards",
    ]
    for name, value in figures_of(expected["a"]).items():
        if name != "explained_variance_legacy":
            assert figures_of(found["a"])[name] == pytest.approx(value, rel=2e-6), name


def test_progress_adds_up_to_the_tokens(tiny_models: dict[str, Path], rows: list[Rows]) -> None:
    lm, done = load_language_model(ModelConfig(name=str(tiny_models["llama"]), layer=1)), []
    evaluate_core(lm, {"a": jump_relu(0), "b": PassThrough(16, 0.5)}, rows, progress=done.append)
    assert sum(done) == pytest.approx(sum(int(part.real.sum()) for part in rows))
    assert len(done) == 3 * len(rows)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The embedded model on its text, 300 tokens in rows of 32."""
    data, console = DataConfig(context=32), Console(file=io.StringIO(), width=500)
    return replace(bench_of(load_language_model(ModelConfig()), ModelConfig(), data, 300, 0, tmp_path), console=console)


def test_core_reads_held_out_text(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    monkeypatch.setattr(passes.Passes, "read", lambda self, ids, real: read.append(ids) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(run_core(bench, {"a": PassThrough(bench.lm.d_in, 1.0)}))
    text = {
        held_out: next(packed_rows(bench.data, bench.lm.tokenizer, rows=len(read[-1]), held_out=held_out)).ids
        for held_out in (True, False)
    }
    assert torch.equal(read[-1], text[True])
    assert not torch.equal(read[-1], text[False])


def test_outliers_are_named_with_both_figures(bench: Bench) -> None:
    (part,) = itertools.islice(bench.rows(), 1)
    x = bench.lm.activations(part.ids)[part.real]
    limit = x.norm(dim=1).quantile(0.98).item()
    saes = {"all": PassThrough(bench.lm.d_in, 0.9), "usual": PassThrough(bench.lm.d_in, 0.9)}
    saes["usual"].config = {"c2r": {"state": {"max_norm": limit}}}
    outcomes = {outcome.sae: outcome for outcome in run_core(bench, saes)}
    printed = bench.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    every = outcomes["usual"].metrics["with_outliers"]
    assert 0 < every["outlier_tokens"] < 0.1 * every["total_tokens"]
    share = every["outlier_tokens"] / every["total_tokens"]
    assert f"usual: {every['outlier_tokens']} of {every['total_tokens']} tokens ({share:.2%}) have a norm" in printed
    assert f"over all tokens, EV is {every['explained_variance']:.4f}" in printed
    assert "all: " not in printed
    assert outcomes["usual"].config == {"tokens": every["total_tokens"]}
    assert outcomes["usual"].unstructured["counting"] == {
        "tokens_counted": every["total_tokens"] - every["outlier_tokens"],
        "outlier_tokens_left_out": every["outlier_tokens"],
        "max_norm": limit,
    }
    assert outcomes["all"].unstructured["counting"]["max_norm"] is None
    assert outcomes["all"].summary["ev"] == pytest.approx(every["explained_variance"])
    assert outcomes["usual"].summary["ev"] != pytest.approx(every["explained_variance"])
    assert "core evaluation: " in printed
    assert "text ended" not in printed


def test_training_records_the_largest_norm_it_keeps(tiny_run: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    state = json.loads((tiny_run["baseline"] / "cfg.json").read_text())["c2r"]["state"]
    assert state["max_norm"] is None  # max_norm_multiple: null
    assert json.loads((whole / "baseline" / "cfg.json").read_text())["c2r"]["state"]["max_norm"] is None
    raw = yaml.safe_load((tiny_run["baseline"].parent / "run.yaml").read_text())
    raw |= {"output": str(tmp_path / "other"), "stream": raw["stream"] | {"max_norm_multiple": 3.0}}
    raw["train"]["tokens"] = 256
    folder = train(parse_config(raw, "test"), console=Console(quiet=True))["baseline"]
    state = json.loads((folder / "cfg.json").read_text())["c2r"]["state"]
    assert state["max_norm"] == pytest.approx(3 * state["median_norm"])
    assert load_sae(folder).config["c2r"]["state"]["max_norm"] == state["max_norm"]


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
    # One category is ours; SAEBench's reader ignores what it does not know.
    assert set(result.core) == set(required) | {"with_outliers"}
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
