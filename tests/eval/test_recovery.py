"""Recovery of known features: every figure against brute force, and SAEs made by hand whose figures are known."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.config.known_features import preset
from c2r.eval.recovery import Recovery
from c2r.eval.stability import matched_cosine
from c2r.eval.suite import evaluate
from c2r.interop.saelens import save_sae
from c2r.known_features.generator import KnownFeatures
from c2r.known_features.presets import known_features
from c2r.sae.model import SAE, Extra

TREE = known_features(preset("tree", parents=3, children=2, independent=4, d_in=16, magnitude_spread=0.3))
PARENTS = range(3)
CHILDREN = range(3, 9)


def sae_of(W_enc: Tensor, W_dec: Tensor, threshold: float = 1e-3) -> SAE:
    width, d_in = W_dec.shape
    extra = Extra(threshold=torch.full((width,), threshold))
    return SAE(W_enc, torch.zeros(width), W_dec, torch.zeros(d_in), architecture="jumprelu", extra=extra)


def true_sae(features: KnownFeatures = TREE) -> SAE:
    """The true dictionary, read exactly: directions are orthogonal."""
    return sae_of(features.directions_GD.clone(), features.directions_GD.clone())


def absorbed_sae(features: KnownFeatures = TREE) -> SAE:
    """Every child's latent stands for its parent and itself, and the parent's latent is silent where a child is on."""
    W_enc, W_dec = features.directions_GD.clone(), features.directions_GD.clone()
    for child in CHILDREN:
        parent = int(features.parent_G[child])
        W_enc[parent] -= 10 * features.directions_GD[child]
        W_dec[child] = F.normalize(features.directions_GD[child] + features.directions_GD[parent], dim=0)
        W_enc[child] *= math.sqrt(2)
    return sae_of(W_enc, W_dec)


def recovered(sae: SAE, features: KnownFeatures = TREE, tokens: int = 6000) -> Recovery:
    found = Recovery(sae, features)
    for sample in features.held_out(tokens, batch=1700):
        found.add(sample)
    return found


def brute_force(sae: SAE, features: KnownFeatures, tokens: int) -> dict[str, float]:
    """The definitions of EVALS.md, one token, latent and parent at a time."""
    parts = list(features.held_out(tokens, batch=1700))
    x, z = torch.cat([part.x_BD for part in parts]), torch.cat([part.z_BG for part in parts])
    acts = sae.encode(x).tolist()
    truth = z.tolist()
    rows = F.normalize(sae.W_dec, dim=1).tolist()
    units = features.directions_GD.tolist()
    width, count = len(rows), len(units)
    cosine = [[sum(a * b for a, b in zip(row, unit, strict=True)) for unit in units] for row in rows]
    nearest = [max(range(count), key=lambda g, j=j: cosine[j][g]) for j in range(width)]

    f1 = []
    for j in range(width):
        hits = sum(acts[t][j] != 0 and truth[t][nearest[j]] > 0 for t in range(tokens))
        fired = sum(acts[t][j] != 0 for t in range(tokens))
        on = sum(truth[t][nearest[j]] > 0 for t in range(tokens))
        precision, recall = hits / max(fired, 1), hits / max(on, 1)
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)

    absorption, hole = [], []
    parents = sorted({p for p in features.parent_G.tolist() if p >= 0})
    for p in parents:
        latent = max(range(width), key=lambda j, p=p: cosine[j][p])
        children = [g for g in range(count) if features.parent_G[g] == p]
        with_child = [t for t in range(tokens) if truth[t][p] > 0 and any(truth[t][c] > 0 for c in children)]
        without = [t for t in range(tokens) if truth[t][p] > 0 and not any(truth[t][c] > 0 for c in children)]
        absorbed = [
            t
            for t in with_child
            if acts[t][latent] == 0
            and any(acts[t][j] * cosine[j][p] >= 0.4 * truth[t][p] for j in range(width) if j != latent)
        ]
        absorption.append(len(absorbed) / len(with_child))
        recall = [sum(acts[t][latent] != 0 for t in group) / len(group) for group in (without, with_child)]
        hole.append(recall[0] - recall[1])

    ever = [any(acts[t][j] != 0 for t in range(tokens)) for j in range(width)]
    latents = [sum(ever[j] and nearest[j] == g and cosine[j][g] > 0.7 for j in range(width)) for g in range(count)]
    return {
        "uniqueness": len(set(nearest)) / width,
        "f1": sum(f1) / width,
        "absorption": sum(absorption) / len(parents),
        "hole": sum(hole) / len(parents),
        "latents_per_feature": sum(latents) / count,
        "latents_per_parent": sum(latents[p] for p in parents) / len(parents),
    }


@pytest.mark.parametrize("depth", [1, 2])
def test_every_figure_against_brute_force(depth: int) -> None:
    features = known_features(
        preset("tree", parents=2, children=2, depth=depth, independent=2, d_in=16, parent_probability=0.4, noise=0.05)
    )
    generator = torch.Generator().manual_seed(1)
    near = features.directions_GD + 0.15 * torch.randn(features.directions_GD.shape, generator=generator)
    W_dec = torch.cat([near, near[:2] + 0.1 * torch.randn(2, 16, generator=generator), -near[:1]])
    W_enc = W_dec + 0.2 * torch.randn(W_dec.shape, generator=generator)
    sae = sae_of(W_enc, W_dec * 1.7, threshold=0.4)  # rows of any norm
    found, expected = recovered(sae, features, 800).metrics(), brute_force(sae, features, 800)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert 0 < expected["absorption"] < 1
    assert 0 < abs(expected["hole"]) < 1


def test_mcc_is_the_best_of_all_pairings() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((5, 5), (4, 6), (6, 4)):
        a, b = torch.randn(rows, 7, generator=generator), torch.randn(columns, 7, generator=generator)
        cosine = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).abs()
        few, many = (cosine, columns) if rows <= columns else (cosine.T, rows)
        best = max(
            sum(few[i, j].item() for i, j in enumerate(order)) / len(few)
            for order in itertools.permutations(range(many), len(few))
        )
        assert matched_cosine(a, b) == pytest.approx(best, abs=1e-6)


# SAEs made by hand


def test_the_true_dictionary() -> None:
    found = recovered(true_sae())
    perfect = dict.fromkeys(("mcc", "uniqueness", "f1", "latents_per_feature", "latents_per_parent"), 1)
    assert found.metrics() == pytest.approx(perfect | {"absorption": 0, "hole": 0}, abs=1e-5)
    fidelity = found.fidelity.metrics()
    assert fidelity["explained_variance"] == pytest.approx(1)
    assert fidelity["l0"] == pytest.approx(TREE.mean_l0, rel=0.05)


def test_an_sae_absorbed_by_hand() -> None:
    found = recovered(absorbed_sae())
    assert found.fidelity.metrics()["explained_variance"] > 0.8  # a fixed ratio of child to parent is all it loses
    assert found.absorption_P.tolist() == [1, 1, 1]
    assert found.hole_P.tolist() == [1, 1, 1]
    assert [row["absorption"] for row in found.details()] == [1, 1, 1]


def test_silence_without_a_stand_in_is_a_hole_and_no_absorption() -> None:
    sae = absorbed_sae()
    sae.W_dec.data[3:9] = TREE.directions_GD[3:9]
    found = recovered(sae)
    assert found.absorption_P.tolist() == [0, 0, 0]
    assert found.hole_P.tolist() == [1, 1, 1]


def test_a_latent_duplicated_by_hand_is_found_by_splitting() -> None:
    sae, copied = true_sae(), [0, 2, 2, 12]
    twice = sae_of(torch.cat([sae.W_enc, sae.W_enc[copied]]), torch.cat([sae.W_dec, sae.W_dec[copied]]))
    found = recovered(twice)
    assert found.latents_G.tolist() == [2, 1, 3] + [1] * 9 + [2]
    assert found.metrics()["latents_per_parent"] == pytest.approx(2)
    assert found.metrics()["latents_per_feature"] == pytest.approx(17 / 13)
    assert found.metrics()["uniqueness"] == pytest.approx(13 / 17)
    assert found.metrics()["mcc"] == pytest.approx(1, abs=1e-5)


def test_dead_and_stray_latents() -> None:
    sae = true_sae()
    sae.b_enc.data[3] = -100.0
    found = recovered(sae)
    assert found.f1_F[3] == 0
    assert found.metrics()["f1"] == pytest.approx(12 / 13, abs=1e-5)
    assert found.latents_G[3] == 0
    assert found.fidelity.metrics()["frac_alive"] == pytest.approx(12 / 13)
    between = true_sae()  # cosine 0.707 to two features counts, 0.577 to three does not
    between.W_dec.data[9] = F.normalize(TREE.directions_GD[9] * 1.001 + TREE.directions_GD[10], dim=0)
    between.W_dec.data[11] = F.normalize(TREE.directions_GD[10:13].sum(0) + 0.001 * TREE.directions_GD[11], dim=0)
    assert recovered(between).latents_G[9:].tolist() == [1, 1, 0, 1]


def test_a_parent_never_on_has_no_figure() -> None:
    features = KnownFeatures(
        TREE.directions_GD, TREE.parent_G, torch.where(torch.arange(13) == 1, 0.0, TREE.probability_G)
    )
    found = recovered(true_sae(features), features)
    assert [math.isnan(value) for value in found.absorption_P.tolist()] == [False, True, False]
    assert found.metrics()["absorption"] == 0
    assert found.metrics()["hole"] == 0


# From folders


def saved(folder: Path, sae: SAE, data: dict[str, Any] | None) -> Path:
    save_sae(sae, folder, metadata={}, c2r={"model": None, "data": data, "sae": {}, "train": {}})
    return folder


def test_recovery_reads_the_preset_from_the_folder(tmp_path: Path) -> None:
    data = {
        "source": "synthetic", "preset": "tree", "parents": 3, "children": 2, "independent": 4, "d_in": 16,
        "magnitude_spread": 0.3,
    }  # fmt: skip
    folders = [saved(tmp_path / "true", true_sae(), data), saved(tmp_path / "absorbed", absorbed_sae(), data)]
    results = evaluate(folders, suites=("recovery",), tokens=3000)
    assert results["true"]["mcc"] == pytest.approx(1, abs=1e-5)
    assert results["true"]["known_absorption"] == 0
    assert results["absorbed"]["known_absorption"] == 1
    assert results["absorbed"]["hole"] == 1
    assert evaluate(folders[::-1], tmp_path / "out", suites=("recovery",), tokens=3000) == results
    assert evaluate(folders, tmp_path / "out", suites=("recovery",), tokens=3000, seed=1) != results


def test_recovery_of_an_sae_of_a_language_model_is_refused(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    (failed,) = evaluate([tiny_run["c2r"]], suites=("recovery",)).failed
    assert "c2r, recovery: ValueError: recovery needs an SAE trained on known features" in failed
    save_sae(true_sae(), tmp_path / "foreign", metadata={}, c2r={})
    (failed,) = evaluate([tmp_path / "foreign"], suites=("recovery",)).failed
    assert "data that its cfg.json does not name" in failed
