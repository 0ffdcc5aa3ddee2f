"""Known features: what fires is what was asked for, to the accuracy of counting; presets, the stream, training."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import c2r
from c2r.config.known_features import PRESETS, preset
from c2r.config.load import parse_config
from c2r.config.run import RunConfig, TrainConfig
from c2r.config.saes import BatchTopKConfig
from c2r.eval.stability import matched_cosine, random_agreement
from c2r.eval.suite import evaluate
from c2r.known_features.generator import KnownFeatures, Sample
from c2r.known_features.presets import known_features, unit_directions, with_cosine
from c2r.known_features.stream import KNOWN, SyntheticStream
from c2r.training import source
from c2r.training.run import Run
from c2r.training.trainer import train

TOKENS = 60_000


def drawn(features: KnownFeatures, tokens: int = TOKENS, seed: int = 0) -> Sample:
    return features.sample(tokens, torch.Generator().manual_seed(seed))


def small(**changes: Any) -> KnownFeatures:
    given = {"parents": 3, "children": 2, "depth": 2, "independent": 2, "parent_probability": 0.3, "zipf": 0.5}
    return known_features(preset("tree", **given | {"child_probability": 0.7, "d_in": 12} | changes))


def within_counting(found: Tensor, expected: Tensor, tokens: int = TOKENS) -> bool:
    """Whether shares of `tokens` are within 4.5 standard errors of probabilities."""
    error = (expected * (1 - expected) / tokens).sqrt()
    return bool(((found - expected).abs() <= 4.5 * error + 1e-9).all())


# What fires


@pytest.mark.parametrize("name", list(PRESETS))
def test_features_fire_as_often_as_they_should(name: str) -> None:
    features = known_features(preset(name))
    on = drawn(features).z_BG > 0
    assert within_counting(on.double().mean(0), features.firing_G)
    assert features.mean_l0 == pytest.approx(on.sum(1).double().mean().item(), rel=0.02)


def test_probabilities_in_closed_form() -> None:
    tree = known_features(preset("tree"))
    assert tree.features == 112
    assert tree.mean_l0 == pytest.approx(16 * 0.15 * 1.8 + 32 * 0.03)
    forest = known_features(preset("forest"))
    assert forest.features == 512
    assert forest.firing_G[:3].tolist() == pytest.approx([0.2, 0.2 / math.sqrt(2), 0.2 / math.sqrt(3)])
    weights = [rank**-0.5 for rank in (1, 2, 3, 4)]
    assert forest.firing_G[17].item() == pytest.approx(0.2 * 0.8 * weights[1] / sum(weights))
    assert forest.firing_G[16 + 64 + 4 * 2 + 3].item() == pytest.approx(  # fourth child of the third child of the first
        0.2 * 0.8**2 * weights[2] * weights[3] / sum(weights) ** 2
    )
    pair = known_features(preset("pair", epsilon=0.03))
    assert pair.firing_G[:3].tolist() == pytest.approx([0.4, 0.23, 0.08])
    trap = known_features(preset("rotation_trap", ratio=4))
    assert trap.firing_G[:2].tolist() == pytest.approx([0.4, 0.08])


def test_children_fire_with_their_parent_alone_and_one_at_a_time() -> None:
    features = small()
    on = drawn(features).z_BG > 0
    for child, parent in enumerate(features.parent_G.tolist()):
        if parent >= 0:
            assert not (on[:, child] & ~on[:, parent]).any()
    for a, b in itertools.combinations(range(features.features), 2):
        if features.parent_G[a] == features.parent_G[b] >= 0:
            assert not (on[:, a] & on[:, b]).any()
    # Roots, and children of different parents, are independent.
    expected = features.firing_G[0] * features.firing_G[1]
    assert within_counting((on[:, 0] & on[:, 1]).double().mean(), expected)
    cousins = [(features.parent_G == parent).nonzero()[0].item() for parent in (0, 1)]
    expected = features.firing_G[cousins[0]] * features.firing_G[cousins[1]]
    assert within_counting((on[:, cousins[0]] & on[:, cousins[1]]).double().mean(), expected)


def test_the_pair_has_its_four_probabilities() -> None:
    on = drawn(known_features(preset("pair", epsilon=0.02))).z_BG > 0
    parent, child = on[:, 0], on[:, 1]
    found = torch.stack([parent & ~child, parent & child, ~parent & child, ~parent & ~child]).double().mean(1)
    assert within_counting(found, torch.tensor([0.2, 0.2, 0.02, 0.58]).double())


def test_lonely_children_exclude_each_other_and_may_have_children() -> None:
    features = KnownFeatures(
        torch.eye(5),
        torch.tensor([-1, 0, 0, 1, -1]),
        torch.tensor([0.5, 0.3, 0.3, 0.5, 0.1]),
        torch.tensor([0.0, 0.4, 0.2, 0.0, 0.0]),
    )
    on = drawn(features).z_BG > 0
    assert within_counting(on.double().mean(0), features.firing_G)
    assert features.firing_G.tolist() == pytest.approx([0.5, 0.35, 0.25, 0.175, 0.1])
    assert not (on[:, 1] & on[:, 2]).any()
    assert not (on[:, 3] & ~on[:, 1]).any()


def test_topics_correlate_roots_and_leave_their_frequencies() -> None:
    p, c, topics = 0.1, 0.6, 3
    features = known_features(
        preset("over_merge_trap", pairs=2, background=2, pair_probability=p, background_probability=p, topics=topics,
               topic_strength=c)
    )  # fmt: skip
    on = drawn(features, 4 * TOKENS).z_BG > 0
    assert within_counting(on.double().mean(0), features.firing_G, 4 * TOKENS)
    for a, b in itertools.combinations(range(6), 2):
        together = 1 + c**2 * (topics - 1) if a % topics == b % topics else 1 - c**2
        expected = torch.tensor(p * p * together).double()
        assert within_counting((on[:, a] & on[:, b]).double().mean(), expected, 4 * TOKENS)


# Magnitudes and directions


def test_activations_are_the_weighted_sum_of_directions() -> None:
    features = small(bias=2.0)
    sample = drawn(features, 50)
    assert features.bias_D is not None
    assert features.bias_D.norm().item() == pytest.approx(2)
    expected = torch.stack(
        [sum(z * u for z, u in zip(row, features.directions_GD, strict=True)) for row in sample.z_BG]
    )
    torch.testing.assert_close(sample.x_BD, expected + features.bias_D)
    noisy = drawn(known_features(preset("tree", noise=0.1, parent_probability=0, independent_probability=0)), 5000)
    assert noisy.x_BD.std().item() == pytest.approx(0.1, rel=0.02)
    assert len(noisy.codes.values_N) == 0


def test_children_scale_with_their_parent() -> None:
    features = small(magnitude_spread=0.0)
    assert set(drawn(features, 100).codes.values_N.tolist()) == {1.0}
    for scale_by_parent in (True, False):
        features = small(scale_by_parent=scale_by_parent)
        z = drawn(features).z_BG
        child, parent = 3, 0
        both = (z[:, child] > 0) & (z[:, parent] > 0)
        own = z[both, child] / (z[both, parent] if scale_by_parent else 1)
        assert 0.5 <= own.min() < 0.51
        assert 1.49 < own.max() <= 1.5
        correlation = torch.corrcoef(torch.stack([own, z[both, parent]]))[0, 1]
        assert abs(correlation.item()) < 4.5 / math.sqrt(int(both.sum()))


def test_directions() -> None:
    torch.testing.assert_close((rows := unit_directions(40, 64, 0)) @ rows.T, torch.eye(40), atol=1e-5, rtol=0)
    for features, least in ((112, 0.6), (512, 1.0)):
        crowded, random = (unit_directions(features, 96, 0, orthogonal=o) for o in (True, False))
        overlap = [(rows @ rows.T - torch.eye(features)).abs().max().item() for rows in (crowded, random)]
        assert overlap[0] < least * overlap[1]
        welch = features * (features - 96) / 96  # the least sum of squared overlaps that so many unit rows can have
        assert (crowded @ crowded.T - torch.eye(features)).square().sum().item() == pytest.approx(welch, rel=0.02)
        torch.testing.assert_close(crowded.norm(dim=1), torch.ones(features))
    turned = with_cosine(unit_directions(10, 8, 0), 3, 0.7)
    cosine = turned @ turned.T
    assert [cosine[0, 1].item(), cosine[2, 3].item(), cosine[4, 5].item()] == pytest.approx([0.7] * 3, abs=1e-5)
    torch.testing.assert_close(turned[[0, 2, 4, 6, 7, 8, 9]], unit_directions(10, 8, 0)[[0, 2, 4, 6, 7, 8, 9]])
    trap = known_features(preset("over_merge_trap", kappa=0.3)).directions_GD
    expected = torch.eye(48)
    for i in range(0, 32, 2):
        expected[i, i + 1] = expected[i + 1, i] = 0.3
    torch.testing.assert_close(trap @ trap.T, expected, atol=1e-5, rtol=0)


def test_an_sae_does_not_begin_at_the_truth() -> None:
    features = known_features(preset("tree"))
    floor = random_agreement(features.features, features.d_in)
    for seed in range(3):
        started = Run(BatchTopKConfig(name="x", width=features.features, k=5, seed=seed), TrainConfig(tokens=512), 96)
        for tree in (features, known_features(preset("tree", feature_seed=seed))):
            assert matched_cosine(started.sae.W_dec, tree.directions_GD) == pytest.approx(floor, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.floats(0, 0.9), st.floats(0, 1),
    st.floats(0, 2), st.integers(0, 3),
)  # fmt: skip
def test_any_tree_keeps_its_rules(
    parents: int, children: int, depth: int, independent: int, p: float, child: float, zipf: float, seed: int
) -> None:
    features = known_features(
        preset("tree", parents=parents, children=children, depth=depth, independent=independent, d_in=8,
               parent_probability=p, child_probability=child, zipf=zipf, orthogonal=False)
    )  # fmt: skip
    sample = drawn(features, 200, seed)
    on = sample.z_BG > 0
    assert len(sample.codes.values_N) == on.sum()  # no event twice
    born = (features.parent_G >= 0).nonzero().squeeze(1)
    assert not (on[:, born] & ~on[:, features.parent_G[born]]).any()
    siblings = torch.zeros(200, features.features).index_add(1, features.parent_G[born], on[:, born].float())
    assert siblings.max() <= 1
    assert within_counting(on.double().mean(0), features.firing_G, 200) or features.firing_G.min() < 0.05


# The stream


def test_the_stream_is_scaled_seeded_and_cut_as_asked() -> None:
    features = small()
    stream = SyntheticStream(features, seed=3)
    whole = torch.cat([x[KNOWN] for x in stream.batches(1000, 20_500)])
    assert whole.shape == (20_500, 12)
    assert whole.square().sum(1).mean().item() == pytest.approx(1, rel=0.06)  # five standard errors
    assert stream.median_norm[KNOWN] / stream.scale[KNOWN] == pytest.approx(whole.norm(dim=1).median().item(), rel=0.08)
    cut = [x[KNOWN] for x in SyntheticStream(features, seed=3).batches(300, 20_500)]
    assert {len(part) for part in cut} == {300, 100}
    assert torch.equal(torch.cat(cut), whole)
    assert not torch.equal(next(SyntheticStream(features, seed=4).batches(300, 300))[KNOWN], cut[0])


def test_held_out_activations_are_others_and_all_there() -> None:
    features = small()
    parts = list(features.held_out(5000, batch=2048))
    assert [len(part.x_BD) for part in parts] == [2048, 2048, 904]
    stream = SyntheticStream(features)
    assert not torch.equal(parts[0].x_BD[:100], next(stream.batches(100, 100))[KNOWN] * stream.scale[KNOWN])


# Refusals


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("bush", {}, r"preset: got 'bush'; accepted are tree, forest, pair, rotation_trap, over_merge_trap"),
        ("tree", {"epsilon": 0.1}, r"preset tree: epsilon: unknown; accepted are .*parents"),
        ("tree", {"parents": 0}, r"parents: .*greater than or equal to 1 \(got 0\)"),
        ("pair", {"epsilon": 0.7}, r"parent_alone, joint, epsilon: got 0.2, 0.2, 0.7; .*less than 1"),
        ("over_merge_trap", {"kappa": 1}, r"kappa: .*less than 1 \(got 1\)"),
    ],
)
def test_presets_refuse(name: str, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        preset(name, **parameters)


def test_features_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.orthogonal: got true for 9000 features in 16 dimensions"):
        known_features(preset("tree", independent=8920, d_in=16))
    with pytest.raises(ValueError, match=r"probability_G: got 1\.2000 for a root in its own topic"):
        known_features(preset("tree", parent_probability=0.4, topics=3, topic_strength=1.0))
    directions, root = torch.eye(3), torch.tensor([-1, -1, -1])
    share = torch.full((3,), 0.5)
    with pytest.raises(ValueError, match="expected unit rows"):
        KnownFeatures(2 * directions, root, share)
    with pytest.raises(ValueError, match=r"parent_G: got \[2\]; expected one value per feature, \[3\]"):
        KnownFeatures(directions, root[:2], share)
    with pytest.raises(ValueError, match="parent_G: expected the index of an earlier feature"):
        KnownFeatures(directions, torch.tensor([-1, 2, 0]), share)
    with pytest.raises(ValueError, match=r"probability_G: .*a sum over siblings of 1\.2000"):
        KnownFeatures(directions, torch.tensor([-1, 0, 0]), torch.tensor([0.5, 0.6, 0.6]))
    with pytest.raises(ValueError, match="alone_G: got a value > 0 for a feature that is not the child of a root"):
        KnownFeatures(directions, root, share, torch.tensor([0.1, 0, 0]))


RAW: dict[str, Any] = {
    "data": {"source": "synthetic", "preset": "tree", "parents": 3, "independent": 4, "d_in": 16},
    "train": {"tokens": 12_800, "batch": 128, "lr": 3e-3, "precision": "float32", "device": "cpu"},
    "saes": [
        {"name": "baseline", "width": 19, "k": 2},
        {"name": "c2r", "width": 19, "k": 2, "c2r": {"strength": 0.1}},
    ],
}


def run_of(output: Path, **changes: Any) -> RunConfig:
    return parse_config({"output": str(output), **RAW, **changes}, "test")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"source": "synthetic"}}, r"data: preset: got None; accepted are tree"),
        (
            {"data": {"source": "synthetik"}},
            r"data: source: got 'synthetik'; accepted are stdlib, files, hf, mixture, synthetic",
        ),
        (
            {"data": RAW["data"] | {"parent": 3}},
            r"data\.parent: unknown key; accepted are source, preset, .*did you mean 'parents'",
        ),
        ({"data": RAW["data"] | {"parents": -1}}, r"data\.parents: .*\(got -1\)"),
        ({"model": {"name": "embedded"}}, r"model: given, but source 'synthetic' makes its activations without"),
        ({"stream": {"model_rows": 3}}, r"stream: given, but source 'synthetic'"),
    ],
)
def test_a_yaml_is_refused_with_the_field(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        run_of(tmp_path, **changes)


# From a YAML to evaluated SAEs


def test_a_preset_trains_without_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr(source, "load_language_model", loaded)
    folders = train(run_of(tmp_path / "run"))
    sae = c2r.load(folders["c2r"])
    ours = sae.config["c2r"]
    assert ours["model"] is None
    assert (ours["data"]["preset"], ours["data"]["parents"], ours["data"]["zipf"]) == ("tree", 3, 0)
    assert sae.config["metadata"]["dataset_path"] == "synthetic:tree"
    features = known_features(run_of(tmp_path).data)
    assert ours["state"]["scale"] == pytest.approx(drawn(features).x_BD.square().sum(1).mean().sqrt().item(), rel=0.03)
    assert c2r.load_config(tmp_path / "run" / "run.yaml") == run_of(tmp_path / "run")
    results = evaluate(list(folders.values()), suites=("recovery",), tokens=4000)
    assert results["c2r"]["ev"] > 0.5
    assert results["c2r"]["true_l0"] == pytest.approx(features.mean_l0)
    written = json.loads((tmp_path / "run" / "evaluations" / "c2r_recovery.json").read_text())
    assert written["eval_config"]["data"]["parents"] == 3
    assert written["eval_result_metrics"]["recovery"]["mcc"] == results["c2r"]["mcc"]
    assert len(written["eval_result_details"]) == 3
    with pytest.raises(ValueError, match=r"trained on known features, .*accepted are recovery, stability"):
        evaluate(list(folders.values()), suites=("core",))


def test_a_fault_of_the_preset_shows_before_the_output_is_touched(tmp_path: Path) -> None:
    data = RAW["data"] | {"parent_probability": 0.5, "topics": 4, "topic_strength": 0.5}
    with pytest.raises(ValueError, match=r"probability_G: got 1\.25"):
        train(run_of(tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()
