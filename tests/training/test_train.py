"""Training from text to an SAE folder, for five model families; saving, loading, interrupts and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import c2r
from builders import CONFIGS, run_config
from c2r import schedules
from c2r.config.run import TrainConfig
from c2r.config.saes import BatchTopKConfig, ConsistencyConfig
from c2r.eval.suite import evaluate, model_of
from c2r.interop.saelens import save_sae
from c2r.language_model.model import load_language_model
from c2r.layout import SAE_WEIGHTS
from c2r.losses import Encoded, Forward, aux_k
from c2r.neighbors import nearest_neighbors
from c2r.sae.model import SAE
from c2r.schedules import learning_rate_factor
from c2r.text.packing import packed_rows
from c2r.training import source
from c2r.training.folder import RUN_MARK
from c2r.training.optim import geometric_median
from c2r.training.run import Run
from c2r.training.trainer import train

# End to end


@pytest.mark.usefixtures("quick_meta")
@pytest.mark.parametrize("family", list(CONFIGS))
def test_text_to_evaluated_sae(family: str, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tiny_models[family], corpus)
    folders = train(config)
    assert {path.name for path in folders.values()} == {"baseline", "c2r"}
    results = evaluate(list(folders.values()), tokens=300)
    for name in folders:
        core = json.loads((tmp_path / "run" / "evaluations" / f"{name}_core.json").read_text())
        assert core["eval_type_id"] == "core"
        assert core["eval_result_metrics"]["reconstruction_quality"]["explained_variance"] > 0.2
        assert core["sae_cfg_dict"]["d_sae"] == 32
        splitting = json.loads((tmp_path / "run" / "evaluations" / f"{name}_splitting.json").read_text())
        assert splitting["eval_result_metrics"]["splitting"]["max_cos_mean"] == results[name]["max_cos_mean"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["sae"] for line in lines} == {"baseline", "c2r"}
    assert lines[-1]["tokens"] == 2560
    assert lines[-1]["penalty_ratio"] > 0


def test_training_is_deterministic_and_pairs_share_their_start(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    again = [train(run_config(tmp_path / name, tiny_models["llama"], corpus)) for name in ("a", "b")]
    for name in ("baseline", "c2r"):
        first, second = (load_file(folders[name] / SAE_WEIGHTS) for folders in again)
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key])
    config = run_config(tmp_path / "c", tiny_models["llama"], corpus)
    one, two = (Run(sae, config.train, 16, seed=0) for sae in config.saes)
    assert torch.equal(one.sae.W_dec, two.sae.W_dec)


def test_recorded_run_can_be_run_again(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tiny_models["llama"], corpus)
    train(config)
    assert c2r.load_config(tmp_path / "run" / "run.yaml") == config


# The step


def planted(seed: int, d_in: int = 32, features: int = 48, active: int = 4, tokens: int = 512) -> torch.Tensor:
    """Sparse sums of fixed unit directions, mean squared norm 1."""
    directions = torch.nn.functional.normalize(torch.randn(features, d_in, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(tokens, features, generator=generator) < active / features
    x = (on * (0.5 + torch.rand(tokens, features, generator=generator))) @ directions
    return x / x.square().sum(1).mean().sqrt()


def trained(steps: int = 400, precision: str = "float32", **changes: Any) -> Run:
    settings = {"name": "x", "width": 96, "k": 4} | changes
    settings_train = TrainConfig(tokens=steps * 512, batch=512, lr=2e-3, precision=precision, warmup_steps=10)
    run = Run(BatchTopKConfig.model_validate(settings), settings_train, 32, seed=0)
    for step in range(steps):
        run.step(planted(step + 1))
    return run


@pytest.fixture(scope="module")
def plain() -> Run:
    """The result of `trained` with default settings."""
    return trained()


def test_inference_l0_is_k_on_fresh_activations(plain: Run) -> None:
    sae = plain.export()
    l0 = (sae.encode(planted(10**6, tokens=4096)) > 0).sum(1).float().mean().item()
    assert l0 == pytest.approx(4, rel=0.1)


def test_c2r_lowers_the_cosines_it_is_given(plain: Run) -> None:
    pressed = trained(c2r=ConsistencyConfig(strength=2.0))
    cosine = [nearest_neighbors(run.sae.W_dec.detach()).cosine.mean().item() for run in (plain, pressed)]
    assert cosine[1] < 0.85 * cosine[0]


def test_bfloat16_product_trains_to_the_same_quality(plain: Run) -> None:
    x = planted(10**6, tokens=4096)
    error = [(run.export()(x) - x).square().sum(1).mean().item() for run in (plain, trained(precision="bfloat16"))]
    assert error[1] == pytest.approx(error[0], rel=0.1)


def test_decoder_rows_stay_at_unit_norm_and_silent_latents_are_counted() -> None:
    run = trained(steps=20, dead_after_tokens=1024)
    torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(96))
    assert run.activity.silent_tokens_F.max() <= 20 * 512
    assert torch.equal(run.activity.dead_F, run.activity.silent_tokens_F >= 1024)


@pytest.mark.parametrize("signed", [False, True])
def test_aux_k_reaches_encoder_and_decoder_of_dead_latents_alone(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(10, 6, generator=generator) for _ in range(2))
    sae = SAE(W_enc, torch.zeros(10), W_dec, torch.zeros(6), architecture="standard")
    x = torch.randn(50, 6, generator=generator)
    dead = torch.arange(10) >= 6
    alive = sae.encode(x).detach() * ~dead
    loss = aux_k(Forward(sae, x, Encoded(alive), dead), 2, signed=signed)
    for gradient in torch.autograd.grad(loss, (sae.W_enc, sae.b_enc, sae.W_dec)):
        assert torch.equal(gradient.reshape(10, -1).abs().sum(1) > 0, dead)
    # By definition: the two strongest dead latents per token reconstruct its residual.
    acts = (x @ W_enc.T if signed else (x @ W_enc.T).relu()) * dead
    acts = acts * (acts.abs() >= acts.abs().topk(2).values[:, 1:])
    residual = x - alive @ W_dec
    expected = (residual - acts @ W_dec).square().sum() / (residual - residual.mean(0)).square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert aux_k(Forward(sae, x, Encoded(alive), torch.zeros(10, dtype=torch.bool)), 2).item() == 0


def test_aux_k_revives_dead_latents() -> None:
    dead = {}
    for coefficient in (0.0, 1.0):
        run = Run(
            BatchTopKConfig(name="x", width=96, k=4, k_anneal=0, dead_after_tokens=2048, aux_coefficient=coefficient),
            TrainConfig(tokens=600 * 512, batch=512, lr=2e-3, precision="float32"),
            32,
        )
        run.sae.b_enc.data[48:] = -0.4  # half of the latents are positive at times, and never among the top
        for step in range(600):
            run.step(planted(step + 1))
        dead[coefficient] = int(run.activity.dead_F.sum())
    assert dead[0.0] > 40
    assert dead[1.0] < 0.8 * dead[0.0]


def test_c2r_is_applied_at_its_steps_and_multiplied_by_the_interval() -> None:
    every = Run(BatchTopKConfig(name="x", width=96, k=4, c2r=ConsistencyConfig(strength=1, every=3, start=2)),
                TrainConfig(tokens=5120, batch=512), 32)  # fmt: skip
    applied = [every.step(planted(i))["c2r"].item() > 0 for i in range(9)]
    assert applied == [False, False, True, False, False, True, False, False, True]
    once, thrice = (
        Run(BatchTopKConfig(name="x", width=96, k=4, c2r=ConsistencyConfig(strength=1, every=n)),
            TrainConfig(tokens=5120, batch=512), 32).step(planted(0))["c2r"]
        for n in (1, 3)
    )  # fmt: skip
    assert thrice.item() == pytest.approx(3 * once.item())


def test_both_units_of_the_strength_are_the_same_run() -> None:
    lam = c2r.lambda_of_strength(0.9, batch=512, width=96)
    runs = [
        trained(5, c2r=ConsistencyConfig(strength=0.9)),
        trained(5, c2r=ConsistencyConfig.model_validate({"lambda": lam})),
    ]
    torch.testing.assert_close(runs[0].sae.W_dec, runs[1].sae.W_dec)


def test_schedule() -> None:
    config = TrainConfig(tokens=1000, batch=10, warmup_steps=10, decay_from=0.8)
    assert learning_rate_factor(0, config) == 0
    assert learning_rate_factor(5, config) == 0.5
    assert learning_rate_factor(50, config) == 1
    assert learning_rate_factor(90, config) == 0.5
    run = Run(BatchTopKConfig(name="x", width=96, k=4, k_anneal=0.1), config, 32)
    ks = []
    for run.step_number in range(12):
        ks.append(schedules.k_of_step(run.config, run.step_number, run.train.steps, run.sae.d_in))
    assert ks == [32, 29, 26, 23, 20, 18, 15, 12, 9, 6, 4, 4]


def test_geometric_median_of_a_symmetric_cloud_ignores_an_outlier() -> None:
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).repeat(25, 1) + 3
    x[0] = 1000
    assert (geometric_median(x) - 3).abs().max() < 0.05


def test_export_before_a_threshold_is_tracked_takes_the_last_batch() -> None:
    run = Run(BatchTopKConfig(name="x", width=96, k=4, k_anneal=0), TrainConfig(tokens=51200, batch=512), 32)
    with pytest.raises(ValueError, match=r"saes\.x: no step has been made"):
        run.export()
    run.step(planted(0))
    assert run.memory.threshold < 0
    assert torch.equal(run.export().threshold, run.memory.smallest.expand(96))
    run.sae.W_enc.data[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"saes\.x: W_enc contain NaN"):
        run.export()


def test_a_last_batch_of_one_token_leaves_the_weights_whole() -> None:
    config = BatchTopKConfig(name="x", width=96, k=2, dead_after_tokens=300)
    run = Run(config, TrainConfig(tokens=2561, batch=256), 32)
    for step in range(10):
        run.step(planted(step, tokens=256))
    assert run.activity.dead_F.any()
    run.step(planted(11, tokens=1))
    run.export()


def test_alive_counts_only_what_has_fired() -> None:
    run = Run(BatchTopKConfig(name="x", width=96, k=4, k_anneal=0), TrainConfig(tokens=51200, batch=512), 32)
    run.sae.b_enc.data[10:] = -100
    assert run.step(planted(0))["alive"].item() <= 10 / 96


def test_scale_is_folded_in(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """The saved SAE on unscaled activations is equivalent to the trained one on scaled ones."""
    kept: list[Run] = []
    original = Run.export

    def export(self: Run, scale: float = 1.0) -> SAE:
        kept.append(self)
        return original(self, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "export", export)
        folders = train(run_config(tmp_path / "run", tiny_models["llama"], corpus))
    sae = c2r.load(folders["c2r"])
    scale = sae.config["c2r"]["state"]["scale"]
    assert sae.config["metadata"]["prepend_bos"] is True
    assert sae.config["metadata"]["context_size"] == 16
    assert sae.config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    lm = load_language_model(model_of(sae.config, None))
    rows = next(packed_rows(run_config(tmp_path, "", corpus).data, lm.tokenizer))
    x = lm.activations(rows.ids)[rows.real]
    torch.testing.assert_close(sae(x), scale * original(kept[1])(x / scale), rtol=1e-5, atol=1e-5 * scale)


def test_a_trained_sae_is_read_back_to_1e_6(tmp_path: Path) -> None:
    sae = trained(50).export(20.0)
    save_sae(sae, tmp_path / "sae", metadata={}, c2r={})
    x = 20 * planted(10**6)
    loaded = c2r.load(tmp_path / "sae")
    assert (loaded(x) - sae(x)).norm() <= 1e-6 * sae(x).norm()
    assert not loaded(x).requires_grad


# Interrupts and refusals


@pytest.mark.parametrize("stop_at", [2, 15])
def test_ctrl_c_saves_what_there_is(
    stop_at: int, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.step

    def step(self: Run, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step_number == stop_at:
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tmp_path / "run", tiny_models["llama"], corpus))
    state = c2r.load(tmp_path / "run" / "c2r").config["c2r"]["state"]
    assert state["stopped"] == "KeyboardInterrupt"
    assert state["tokens"] == stop_at * 128


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path / "run", tiny_models["llama"], corpus)
    original = Run.step

    def step(self: Run, x: torch.Tensor) -> dict[str, torch.Tensor]:
        broken = self.step_number >= 3 and self.config.name == "baseline"
        return original(self, x * float("nan") if broken else x)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(ValueError, match=r"saes\.baseline: the loss is nan at step 4"):
        train(config)
    assert not (tmp_path / "run" / "baseline").exists()
    assert "the loss is nan" in c2r.load(tmp_path / "run" / "c2r").config["c2r"]["state"]["stopped"]


def test_a_source_that_breaks_on_the_way_loses_no_sae(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [json.dumps({"text": f"line {i} and some more words"}) for i in range(400)]
    path.write_text("\n".join([*lines, '{"body": "x"}']))
    train_section = {"tokens": 10**6, "batch": 128, "lr": 1e-3, "device": "cpu"}
    with pytest.raises(ValueError, match="no text under 'text'"):
        train(run_config(tmp_path / "run", tiny_models["llama"], path, train=train_section))
    assert c2r.load(tmp_path / "run" / "baseline").config["c2r"]["state"]["tokens"] > 1000


def test_refusals_come_before_the_model_is_loaded(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(source, "load_language_model", loaded)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("all my work")
    with pytest.raises(ValueError, match=r"output: .*contains files that c2r did not write \(thesis\.tex\)"):
        train(run_config(full, tiny_models["llama"], corpus), overwrite=True)
    assert (full / "thesis.tex").exists()
    with pytest.raises(ValueError, match="cannot create the folder"):
        train(run_config(full / "thesis.tex", tiny_models["llama"], corpus))
    with pytest.raises(ValueError, match=r"data\.path: no file matches"):
        train(run_config(tmp_path / "a", tiny_models["llama"], tmp_path / "nowhere"))
    (full / "thesis.tex").unlink()
    (full / "run.yaml").write_text("seed: 0")  # a user's own file of that name
    with pytest.raises(ValueError, match=r"contains files that c2r did not write \(run\.yaml\)"):
        train(run_config(full, tiny_models["llama"], corpus), overwrite=True)
    (full / "run.yaml").write_text(RUN_MARK + "seed: 0")
    with pytest.raises(ValueError, match=r"cannot resume the run in .*configuration has changed"):
        train(run_config(full, tiny_models["llama"], corpus))
    long = {"source": "files", "path": str(corpus), "context": 65}
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"data\.context: got 65; .* reads at most 64 tokens"):
        train(run_config(tmp_path / "b", tiny_models["gpt2"], corpus, data=long))


def test_overwrite_replaces_an_earlier_run(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    train(run_config(tmp_path / "run", tiny_models["llama"], corpus))
    saes = [{"name": "other", "width": 16, "k": 2}]
    train(run_config(tmp_path / "run", tiny_models["llama"], corpus, saes=saes), overwrite=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".c2r", "run.yaml", "metrics.jsonl", "other"}


@pytest.mark.usefixtures("quick_meta")
def test_evaluations_that_do_not_fit_are_refused(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    folders = train(run_config(tmp_path / "a", tiny_models["llama"], corpus))
    first_layer = {"model": {"name": str(tiny_models["llama"]), "layer": 0}}
    other = train(run_config(tmp_path / "b", tiny_models["llama"], corpus, **first_layer))
    with pytest.raises(ValueError, match="evaluate them separately"):
        evaluate([folders["c2r"], other["baseline"]])
    with pytest.raises(ValueError, match="got 'cores'; accepted are core"):
        evaluate([folders["c2r"]], suites=("cores",))
    with pytest.raises(ValueError, match="folders: got none"):
        evaluate([])
    with pytest.raises(ValueError, match=r"no cfg\.json"):
        evaluate([tmp_path])
    with pytest.raises(ValueError, match=r"tokens: .*greater than or equal to 1 \(got 0\)"):
        evaluate([folders["c2r"]], tokens=0)
    same = train(run_config(tmp_path / "c", tiny_models["llama"], corpus))
    assert set(evaluate([folders["c2r"], same["c2r"]], tmp_path / "out", tokens=50)) == {"a_c2r", "c_c2r"}
