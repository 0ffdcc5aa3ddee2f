"""Every method: encoding, saving and the effect of C²R; warm starts; the ablations."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import c2r
from builders import ROOT, run_config, write_corpus
from c2r.config.load import load_config
from c2r.config.run import TrainConfig
from c2r.config.saes import (
    SECTIONS,
    BatchTopKConfig,
    ConsistencyConfig,
    MatryoshkaConfig,
    PAnnealConfig,
    group_ends,
)
from c2r.interop.saelens import save_sae
from c2r.kernels.codes import norms, to_dense
from c2r.losses import Encoded, Forward, lp
from c2r.losses import reconstruction as reconstruction_of
from c2r.methods import METHODS
from c2r.neighbors import nearest_neighbors, random_floor
from c2r.penalty import consistency_penalty
from c2r.sae.model import SAE, Extra
from c2r.training.run import Run
from c2r.training.trainer import train
from small_runs import SETTINGS, TREE, configured, fresh, plain, trained

TENSORS = {"W_enc", "b_enc", "W_dec", "b_dec"}
FOLDERS = {  # FORMATS: architecture and tensors
    "standard": ("standard", TENSORS),
    "april_update": ("standard", TENSORS),
    "p_anneal": ("standard", TENSORS),
    "top_k": ("topk", TENSORS),
    "abs_top_k": ("abs_topk", TENSORS),
    "batch_top_k": ("jumprelu", TENSORS | {"threshold"}),
    "matryoshka_batch_top_k": ("jumprelu", TENSORS | {"threshold"}),
    "ort": ("jumprelu", TENSORS | {"threshold"}),
    "jump_relu": ("jumprelu", TENSORS | {"threshold"}),
    "gated": ("gated", {"W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"}),
}
BATCH_FAMILY = ["batch_top_k", "matryoshka_batch_top_k", "ort"]


def explained(sae: SAE, x: Tensor) -> float:
    return 1 - ((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()


# Training and saving


@pytest.mark.parametrize("method", list(SECTIONS))
def test_c2r_lowers_cosines_and_keeps_the_reconstruction(method: str) -> None:
    x = fresh()
    pressed = trained(method, c2r={"strength": 0.1}).export()
    cosine = [nearest_neighbors(sae.W_dec.detach()).cosine.mean().item() for sae in (plain(method), pressed)]
    assert cosine[1] < cosine[0]
    assert explained(plain(method), x) > 0.6
    # With a fixed number of latents per token it costs more: see docs/explanation/methods.md.
    allowed = 0.05 if method in ("top_k", "abs_top_k") else 0.02
    assert explained(pressed, x) > explained(plain(method), x) - allowed


@pytest.mark.parametrize("method", list(SECTIONS))
def test_a_saved_method_has_its_tensors_and_gives_the_same_codes(method: str, tmp_path: Path) -> None:
    run, scale = trained(method, 60, c2r={"strength": 0.3}), 7.0
    save_sae(run.export(scale), tmp_path / "sae", metadata={}, c2r={})
    architecture, tensors = FOLDERS[method]
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == architecture
    assert config["apply_b_dec_to_input"] is (method != "jump_relu")
    assert ("k" in config) == (architecture in ("topk", "abs_topk"))
    assert set(load_file(tmp_path / "sae" / "sae_weights.safetensors")) == tensors
    loaded, x = c2r.load(tmp_path / "sae"), fresh(200)
    expected = run.export().encode(x)
    found = loaded.encode(scale * x) / scale / run.sae.W_dec.norm(dim=1)  # free decoder norms are folded in
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(scale * x) / scale, run.export()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["standard", "april_update", "p_anneal", "jump_relu", "gated", "top_k", "abs_top_k"])
def test_training_and_inference_encode_alike(method: str) -> None:
    run, x = trained(method, 40, **({"k_anneal": 0} if "top_k" in method else {})), fresh(100)
    acts = to_dense(run.method.encode(run.seen(x)).acts)
    torch.testing.assert_close(acts, run.export().encode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", BATCH_FAMILY)
def test_inference_l0_stays_at_k(method: str) -> None:
    l0 = (plain(method).encode(fresh(20_000)) > 0).sum(1).float().mean().item()
    assert l0 == pytest.approx(2, rel=0.1)


def test_every_method_trains_from_a_yaml(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    saes = [
        {"name": m, "method": m, "width": 40, "c2r": {"strength": 0.3}, **SETTINGS.get(m, {"k": 3})} for m in SECTIONS
    ]
    config = run_config(tmp_path / "run", tiny_models["llama"], write_corpus(tmp_path / "text"), saes=saes)
    folders = train(config)
    assert set(folders) == set(SECTIONS)
    assert load_config(tmp_path / "run" / "run.yaml") == config
    for method, folder in folders.items():
        assert c2r.load(folder).config["metadata"]["training_architecture"] == method


@pytest.mark.parametrize("method", ["standard", "gated", "jump_relu", "matryoshka_batch_top_k", "abs_top_k"])
def test_bfloat16_product(method: str) -> None:
    half = trained(method, precision="bfloat16").export()
    assert explained(half, fresh()) == pytest.approx(explained(plain(method), fresh()), abs=0.05)


# What C²R acts on


@pytest.mark.parametrize("method", list(SECTIONS))
def test_penalty_sees_the_right_activations_and_the_decoder_the_right_way_round(method: str) -> None:
    run, x = trained(method, 5, c2r={"lambda": 2.0, "neighbors": "exact"}), fresh(300)
    with torch.no_grad():
        encoded = run.method.encode(run.seen(x))
        term = run.consistency(run.seen(x), encoded)  # pyright: ignore[reportOptionalCall]
        pre = run.sae.pre_activations(x)
        seen = torch.relu(pre) if method == "gated" else to_dense(encoded.acts)
    expected = 2.0 * consistency_penalty(seen, run.sae.W_dec.detach())
    if method == "abs_top_k":
        assert (seen < 0).any()
        torch.testing.assert_close(norms(encoded.acts), norms(seen.abs()))
    assert term.item() == pytest.approx(expected.item(), rel=1e-5)
    assert run.sae.W_dec.shape == (TREE.features, TREE.d_in)


def test_matryoshka_neighbours_cross_groups() -> None:
    run = trained("matryoshka_batch_top_k", 50, c2r={"strength": 0.1, "neighbors": "exact"})
    ends = torch.tensor(group_ends(run.config.fractions, TREE.features))
    group = torch.bucketize(torch.arange(TREE.features), ends, right=True)
    assert (group[run.neighbors().index] != group).any()


def test_ort_and_c2r_share_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    run, searches = trained("ort", 1, c2r={"strength": 0.1}), []
    original = run.table.refresh
    monkeypatch.setattr(run.table, "refresh", lambda W: searches.append(1) or original(W))
    for _ in range(3):
        run.step(fresh(64))
    assert len(searches) == 3


# Single functions, computed by hand


def test_lp_by_hand_and_without_nan() -> None:
    acts = torch.tensor([[4.0, 0.0], [9.0, 1.0]], requires_grad=True)
    loss = lp(acts, 0.5)
    assert loss.item() == pytest.approx((2 + 3 + 1) / 2)
    loss.backward()
    assert acts.grad is not None
    assert acts.grad.tolist() == [[pytest.approx(0.125), 0], [pytest.approx(1 / 12), pytest.approx(0.25)]]


def test_p_falls_in_stages_and_the_term_does_not_jump() -> None:
    config = PAnnealConfig(name="x", width=TREE.features, l1=0.05, anneal_from=0.2, anneal_to=0.7)
    run = Run(config, TrainConfig(tokens=25600, batch=256, precision="float32"), TREE.d_in)
    acts, x = torch.rand(64, TREE.features), fresh(64)
    forward = Forward(run.sae, x, Encoded(acts), run.activity.dead_F)
    ps, values = [], []
    for run.step_number in range(100):
        term = run.method.terms["lp"](run.seen(x), forward).item()
        ps.append(run.memory.p)
        values.append(run.memory.scale * lp(acts, run.memory.p).item())
        assert term == pytest.approx(0.05 * min(run.step_number / 10, 1) * values[-1])
    assert ps[19] == 1
    assert ps[20] == pytest.approx(0.92)
    assert ps[99] == pytest.approx(0.2)
    assert len(set(ps)) == 11
    assert values == pytest.approx([values[0]] * 100, rel=1e-4)


def test_matryoshka_prefixes() -> None:
    run = trained("matryoshka_batch_top_k", 5)
    x = fresh(50)
    forward_acts = run.method.encode(run.seen(x))
    forward = Forward(run.sae, x, forward_acts, run.activity.dead_F)
    dense, expected = to_dense(forward_acts.acts), 0.0
    for end, found in zip(forward_acts.ends, forward.prefixes, strict=True):
        prefix = dense[:, :end] @ run.sae.W_dec[:end] + run.sae.b_dec
        torch.testing.assert_close(found, prefix, rtol=1e-4, atol=1e-5)
        expected += (x - prefix).square().sum(1).mean().item() / 3
    assert reconstruction_of(forward, (1 / 3,) * 3).item() == pytest.approx(expected, rel=1e-5)
    assert group_ends((1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32), 65536) == (2048, 6144, 14336, 30720, 65536)


# Strength, margin, ablations


def test_margin_at_the_floor_and_warm_up() -> None:
    run = trained("batch_top_k", 1, c2r={"lambda": 3.0, "margin": "floor", "start": 2, "warmup_steps": 4, "every": 2})
    assert run.consistency is not None
    assert run.consistency.margin == pytest.approx(random_floor(TREE.features, TREE.d_in))
    applied = [run.consistency.lam(256, TREE.features, s) if run.consistency.applies(s) else None for s in range(9)]
    assert applied == [None, None, 0, None, 3, None, 6, None, 6]


@pytest.mark.parametrize("ablation", ["unit_cosine", "shuffled_norms"])
def test_ablations(ablation: str) -> None:
    x = fresh(300)
    settings = {"lambda": 1.0, "neighbors": "exact", "ablation": ablation}
    run = trained("batch_top_k", 5, c2r=settings)
    encoded = run.method.encode(run.seen(x))
    term = run.consistency(run.seen(x), encoded).item()  # pyright: ignore[reportOptionalCall]
    own = consistency_penalty(encoded.acts, run.sae.W_dec).item()
    n, j = norms(encoded.acts), run.neighbors()
    if ablation == "unit_cosine":
        assert term == pytest.approx((n + n[j.index]).mean().item(), rel=1e-5)
    else:
        assert term != pytest.approx(own, rel=1e-3)
        alike = Run(configured("batch_top_k", c2r=settings), run.train, TREE.d_in).consistency
        assert alike is not None
        same = torch.full_like(n, 0.5)  # with equal norms, shuffling changes nothing
        expected = consistency_penalty(same[None], run.sae.W_dec)
        assert alike.term(same[None], run.sae.W_dec, j, 1, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_alpha_zero_is_orthogonality() -> None:
    run = trained("ort", 5, c2r={"lambda": 0.25, "alpha": 0, "neighbors": "exact"})
    measured = run.step(fresh(100))
    assert measured["c2r"].item() == pytest.approx(measured["orthogonality"].item(), rel=1e-6)


# Configuration


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "matryoshka_batch_top_k", "k": 2, "fractions": [0.5, 0.6]}, "sum to 1.1"),
        ({"method": "matryoshka_batch_top_k", "k": 2, "fractions": [0.001, 0.999]}, "a group would be empty"),
        ({"method": "matryoshka_batch_top_k", "k": 2, "fractions": [0.5, 0.5], "weights": [1]}, "one per fraction"),
        ({"method": "p_anneal", "anneal_from": 0.9}, "anneal_from: got 0.9"),
        ({"method": "standard", "k": 3}, "k: unknown key; accepted are .*l1"),
        ({"method": "jump_relu"}, "target_l0: Field required"),
        ({"k": 2, "c2r": {"strength": 1, "margin": "ceiling"}}, "margin"),
        ({"k": 2, "c2r": {"strength": 1, "neighbors": "nearest"}}, r"neighbors.*\(got 'nearest'\)"),
    ],
)
def test_faults_of_methods_are_named(section: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    raw = {"output": "x", "train": {"tokens": 4096}, "saes": [{"name": "a", "width": 16, **section}]}
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=says):
        load_config(path)


def test_extras_that_do_not_fit_an_architecture() -> None:
    W, b = torch.ones(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match=r"architecture 'topk' requires \{'k'\}"):
        SAE(W, b, W, torch.ones(2), architecture="topk")
    with pytest.raises(ValueError, match=r"got \{'k'\}; architecture 'standard' requires \{\}"):
        SAE(W, b, W, torch.ones(2), architecture="standard", extra=Extra(k=1))


def test_public_names_of_methods() -> None:
    assert set(SECTIONS) == set(METHODS) == set(FOLDERS)
    assert BatchTopKConfig(name="x", width=4, k=1).method == "batch_top_k"
    assert MatryoshkaConfig(name="x", width=64, k=1).fractions == (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    assert ConsistencyConfig(strength=0.9).neighbors == "lagged"


# The worked examples


@pytest.fixture
def examples() -> Iterator[list[str]]:
    """The Python code in CONTRIBUTING.md; its methods are removed from the tables afterwards."""
    before = dict(SECTIONS), dict(METHODS)
    yield re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    for table, entries in zip((SECTIONS, METHODS), before, strict=True):
        table.clear()
        table.update(entries)


def test_the_worked_examples_of_contributing(examples: list[str], tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for example, text in zip(("hoyer", "adaptive_l1"), examples, strict=True):
        assert len(text.splitlines()) <= 45
        exec(compile(text, "CONTRIBUTING.md", "exec"), {})
        sections = {"hoyer": {"hoyer": 0.02}, "adaptive_l1": {"target_l0": 3}}[example]
        saes = [{"name": "x", "method": example, "width": 32, **sections, "c2r": {"strength": 0.3}}]
        output = tmp_path / example
        config = run_config(output, tiny_models["llama"], write_corpus(tmp_path / "text"), saes=saes)
        folder = train(config)["x"]
        assert c2r.load(folder).architecture == "standard"
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["hoyer" if example == "hoyer" else "l1"] > 0


def test_what_an_examples_method_remembers_is_in_its_checkpoint(examples: list[str]) -> None:
    exec(compile(examples[1], "CONTRIBUTING.md", "exec"), {})
    section = SECTIONS["adaptive_l1"].model_validate({"name": "x", "width": TREE.features, "target_l0": 2})
    whole, resumed = (Run(section, TrainConfig(tokens=25600, batch=256), TREE.d_in) for _ in range(2))
    for _ in range(5):
        whole.step(fresh(256))
    assert whole.memory.l1 == pytest.approx(0.05 * 1.01**5)  # half of the latents fire at first
    resumed.load_state_dict(whole.state_dict())
    assert resumed.memory.l1 == whole.memory.l1
