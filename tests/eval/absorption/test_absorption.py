"""Absorption on arrays: SAEBench's own numbers, an SAE absorbed by hand, a loop over words, bad input."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from builders import ROOT
from c2r.config.evaluations import AbsorptionSettings
from c2r.eval.absorption.concepts import Absorption, EncodedSamples, Labelled, absorption, encoded, splits
from c2r.eval.absorption.probes import LinearProbe
from c2r.eval.absorption.scoring import score_samples
from c2r.eval.absorption.sparse_probes import l1_probe
from c2r.kernels.codes import from_dense
from c2r.sae.model import SAE
from small_runs import random_case

GOLDEN = Path(os.environ.get("C2R_GOLDEN_DIR", ROOT / "tests" / "golden"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"


# SAEBench 0.6.0


@pytest.fixture(scope="module")
def golden() -> tuple[Absorption, dict[str, Any], dict[str, Tensor]]:
    arrays = load_file(GOLDEN / "absorption.safetensors")
    x, y = arrays["x"], arrays["letter"]
    z = torch.relu(x @ arrays["W_enc"] + arrays["b_enc"])
    train, test = arrays["train"], arrays["test"]
    result = absorption(
        Labelled(x[train], y[train], x[test], y[test]),
        EncodedSamples(from_dense(z[train]), from_dense(z[test]), arrays["W_dec"]),
        LETTERS,
        probe=LinearProbe(arrays["probe.weight"], arrays["probe.bias"]),
        l1_weight_CF=arrays["l1_probe.weight"],
    )
    return result, json.loads((GOLDEN / "absorption.json").read_text()), arrays


@pytest.mark.parametrize("letter", LETTERS)
def test_each_letter_as_sae_bench_has_it(letter: str, golden: tuple[Absorption, dict[str, Any], Any]) -> None:
    found, expected = golden[0].classes[LETTERS.index(letter)], golden[1]["letters"][letter]
    assert found.probe_f1 == pytest.approx(expected["probe_f1"], abs=1e-6)
    assert found.f1_by_k == pytest.approx(expected["f1_by_k"], abs=0.01)
    assert found.split_latents == expected["split_latents"]
    assert found.scored == expected["scored_words"]
    assert (found.fraction or 0) == pytest.approx(expected["absorption_fraction"] or 0, abs=1e-4)
    assert (found.full_rate or 0) == pytest.approx(expected["full_absorption"] or 0, abs=1e-9)


def test_each_word_and_the_aggregates_as_sae_bench_has_them(
    golden: tuple[Absorption, dict[str, Any], dict[str, Tensor]],
) -> None:
    found, expected, arrays = golden
    words = {word["index"]: word for word in expected["words"]}
    index = arrays["test"][found.scored.index_n].tolist()
    assert sorted(index) == sorted(words)
    for i, letter, fraction, full in zip(index, *(values.tolist() for values in found.scored[1:]), strict=True):
        assert LETTERS[letter] == words[i]["letter"]
        assert fraction == pytest.approx(words[i]["absorption_fraction"], abs=1e-4)
        assert full == words[i]["full_absorption"]
    assert [letter.name for letter in found.passing] == expected["letters_passing"]
    means = {
        "mean_absorption_fraction_score": expected["mean_absorption_fraction"],
        "std_dev_absorption_fraction_score": expected["std_absorption_fraction"],
        "mean_full_absorption_score": expected["mean_full_absorption"],
        "std_dev_full_absorption_score": expected["std_full_absorption"],
        "mean_num_split_features": expected["mean_num_split_features"],
    }
    assert found.means is not None
    assert {name: found.means[name] for name in means} == pytest.approx(means, abs=1e-6)
    counts = [len(letter.split_latents) for letter in found.passing]
    assert found.means["std_dev_num_split_features"] == pytest.approx(statistics.stdev(counts))


# Absorbed by hand

CLASSES, WORDS = 4, 160


def by_hand(share: float) -> tuple[Labelled, EncodedSamples]:
    """Words are their class's direction and one of their own, all orthogonal; `share` of the first is in the latter.

    Latents 0 to C − 1 are the classes', then one a word. In the training part no word is absorbed; in the test part a
    word's latent carries `share` of the class's direction, and the class's latent what is left.
    """
    basis = torch.linalg.qr(torch.randn(CLASSES + WORDS, CLASSES + WORDS, generator=torch.Generator().manual_seed(0)))[
        0
    ]
    y, word = torch.arange(WORDS) % CLASSES, torch.arange(WORDS)
    x = basis[y] + basis[CLASSES + word]
    train = WORDS // 2
    carried = torch.where(word < train, 0.0, share)
    rows = carried[:, None] * basis[y] + basis[CLASSES + word]
    acts = torch.zeros(WORDS, CLASSES + WORDS)
    acts[word, y] = 1 - carried
    acts[word, CLASSES + word] = rows.norm(dim=1)
    decoder = torch.cat([basis[:CLASSES], rows / rows.norm(dim=1, keepdim=True)])
    data = Labelled(x[:train], y[:train], x[train:], y[train:])
    return data, EncodedSamples(from_dense(acts[:train]), from_dense(acts[train:]), decoder)


@pytest.mark.parametrize("trained", [True, False])
def test_the_true_dictionary_has_none_and_one_absorbed_by_hand_has_all(trained: bool) -> None:
    few = AbsorptionSettings(min_classes=CLASSES)
    for share, expected in ((0.0, 0.0), (1.0, 1.0)):
        data, acts = by_hand(share)
        probe = None if trained else true_probe(acts)
        found = absorption(data, acts, "wxyz", settings=few, probe=probe)
        assert found.means is not None
        assert found.means["mean_absorption_fraction_score"] == pytest.approx(expected, abs=1e-6)
        assert found.means["mean_full_absorption_score"] == expected
        assert found.means["mean_num_split_features"] == 1
        assert [letter.split_latents for letter in found.classes] == [[0], [1], [2], [3]]
        assert all(letter.scored == WORDS // 2 // CLASSES for letter in found.classes)


def true_probe(acts: EncodedSamples) -> LinearProbe:
    """The classes' own directions."""
    return LinearProbe(acts.W_dec_FD[:CLASSES], torch.full((CLASSES,), -0.5))


@pytest.mark.parametrize(("share", "fraction"), [(0.3, 0.0), (0.5, 0.5), (0.75, 0.75), (0.95, 0.95)])
def test_a_part_absorbed_by_hand_is_that_fraction(share: float, fraction: float) -> None:
    data, acts = by_hand(share)
    found = absorption(data, acts, "wxyz", settings=AbsorptionSettings(min_classes=4), probe=true_probe(acts))
    assert found.scored.fraction_n.tolist() == pytest.approx([fraction] * len(found.scored.fraction_n), abs=1e-5)
    assert not found.scored.full_n.any()  # the class's latent still speaks


def test_split_latents_by_hand() -> None:
    assert splits([0.5, 0.6, 0.62, 0.9], 0.03) == 2
    assert splits([0.0], 0.03) == 1
    assert splits([0.5, 0.53, 0.9], 0.03) == 1  # a jump must be larger
    assert splits([0.1, 0.2, 0.3, 0.4], 0.03) == 4
    data, acts = by_hand(0.0)
    # The class's latent cut in two by word: each half speaks for its half alone.
    both = []
    for part in (acts.train, acts.test):
        dense = torch.zeros(part.support.batch, acts.train.width + CLASSES)
        dense[part.support.tokens_N, part.support.latents_N] = part.values_N
        odd = torch.arange(len(dense)) // CLASSES % 2 == 1
        dense[odd, -CLASSES:] = dense[odd, :CLASSES]
        dense[odd, :CLASSES] = 0
        both.append(from_dense(dense))
    halves = EncodedSamples(*both, torch.cat([acts.W_dec_FD, acts.W_dec_FD[:CLASSES]]))
    found = absorption(data, halves, "wxyz", settings=AbsorptionSettings(min_classes=4), probe=true_probe(acts))
    assert [set(letter.split_latents) for letter in found.classes] == [{c, c + CLASSES + WORDS} for c in range(4)]
    assert found.means is not None
    assert found.means["mean_num_split_features"] == 2
    assert found.means["mean_absorption_fraction_score"] == 0


# Random inputs


def test_the_order_of_latents_changes_nothing() -> None:
    data, sae = random_case(0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        other = SAE(sae.W_enc[order], sae.b_enc[order], sae.W_dec[order], sae.b_dec, architecture="standard")
    few = AbsorptionSettings(min_classes=3)
    one, two = (absorption(data, s, "abc", settings=few) for s in (sae, other))
    torch.testing.assert_close(one.scored.fraction_n, two.scored.fraction_n, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.scored.full_n, two.scored.full_n)
    for a, b in zip(one.classes, two.classes, strict=True):
        assert a.split_latents == order[b.split_latents].tolist()
        assert a.f1_by_k == pytest.approx(b.f1_by_k)


def test_the_length_of_decoder_rows_changes_nothing() -> None:
    """Activations count in units of unit rows: x̂ is the same, so is what is carried."""
    data, sae = random_case(2)
    length = 0.2 + 3 * torch.rand(30, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        other = SAE(
            sae.W_enc / length[:, None], sae.b_enc / length, sae.W_dec * length[:, None], sae.b_dec,
            architecture="standard",
        )  # fmt: skip
    few = AbsorptionSettings(min_classes=3)
    one, two = (absorption(data, s, "abc", settings=few) for s in (sae, other))
    torch.testing.assert_close(one.scored.fraction_n, two.scored.fraction_n, rtol=1e-4, atol=1e-5)
    unit = encoded(sae, data)
    torch.testing.assert_close(unit.W_dec_FD.norm(dim=1), torch.ones(30))


def loop(x: Tensor, z: Tensor, u: Tensor, cosine: Tensor, main: list[int]) -> tuple[float, bool]:
    """One word, as EVALS.md has it."""
    p = {i: z[i].item() * cosine[i].item() for i in range(len(z))}
    projection = sum((x * u).tolist())
    own = sum(p[i] for i in main)
    others = sorted((p[i] for i in p if i not in main and cosine[i] >= 0.1 and p[i] > 0), reverse=True)[:3]
    carried = sum(others)
    fraction = 0.0
    if not (own >= projection or projection <= 0 or carried / projection < 0.4):
        part = min(carried, projection - own)
        fraction = 1.0 if own <= 0 else part / (part + own)
    top = max(p, key=lambda i: p[i])
    silent = all(z[i] < 1e-8 for i in main)
    return fraction, silent and cosine[top].item() >= 0.025 and projection > 0 and p[top] / projection >= 0.4


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), width=st.integers(1, 14), own=st.integers(1, 3))
def test_the_vectorised_score_is_that_of_a_loop_over_words(seed: int, n: int, width: int, own: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, 5, generator=g), torch.relu(torch.randn(n, width, generator=g) * 2)
    unit = torch.nn.functional.normalize(torch.randn(n, 5, generator=g), dim=1)
    cosine = torch.rand(n, width, generator=g) * 1.4 - 0.4
    main = [torch.randperm(width, generator=g)[:own].tolist() for _ in range(n)]
    mask = torch.zeros(n, width, dtype=torch.bool)
    for row, latents in enumerate(main):
        mask[row, latents] = True
        z[row, latents] *= (torch.rand(len(latents), generator=g) < 0.5).float()
    fraction, full = score_samples(x, z, unit, cosine, mask, AbsorptionSettings())
    for i in range(n):
        expected = loop(x[i], z[i], unit[i], cosine[i], main[i])
        assert fraction[i].item() == pytest.approx(expected[0], abs=1e-5)
        assert bool(full[i]) == expected[1]


def test_the_l1_probes_batch_is_a_setting() -> None:
    """With its default, 7 samples here, the latents come in another order."""
    data, sae = random_case(0)
    acts = encoded(sae, data)
    found, given = (
        absorption(data, acts, "abc", settings=AbsorptionSettings(min_classes=3, l1_batch=batch), l1_weight_CF=weight)
        for batch, weight in ((50, None), (None, l1_probe(acts.train, data.y_train_B, 3, batch=50)))
    )
    assert [one.f1_by_k for one in found.classes] == [one.f1_by_k for one in given.classes]


# The gate, and bad input


def test_too_few_classes_is_a_reason_and_never_a_number() -> None:
    data, acts = by_hand(1.0)
    blind = LinearProbe(torch.cat([acts.W_dec_FD[:3], -acts.W_dec_FD[3:4]]), torch.full((4,), -0.5))
    found = absorption(data, acts, "wxyz", settings=AbsorptionSettings(min_classes=4), probe=blind)
    assert found.means is None
    assert found.reason == "only 3 of 4 classes have a ground-truth probe with F1 > 0.6; 4 are needed"
    assert (found.classes[3].scored, found.classes[3].fraction, found.classes[3].full_rate) == (0, None, None)
    enough = absorption(data, acts, "wxyz", settings=AbsorptionSettings(min_classes=3), probe=blind)
    assert enough.reason is None
    assert enough.means is not None
    assert enough.means["mean_absorption_fraction_score"] == pytest.approx(1)


def test_bad_input_is_named() -> None:
    data, sae = random_case(0)
    few = AbsorptionSettings(min_classes=3)
    with pytest.raises(ValueError, match="min_classes: got 20, but there are 3 classes"):
        absorption(data, sae, "abc")
    with pytest.raises(ValueError, match="train: no sample of d"):
        absorption(data, sae, "abcd", settings=few)
    with pytest.raises(ValueError, match="got labels from 0 to 2, but there are 2 classes"):
        absorption(data, sae, "ab", settings=AbsorptionSettings(min_classes=2))
    with pytest.raises(ValueError, match="got 119 samples and 120 labels"):
        absorption(data._replace(x_test_BD=data.x_test_BD[1:]), sae, "abc", settings=few)
    wide = SAE(torch.eye(13), torch.zeros(13), torch.eye(13), torch.zeros(13), architecture="standard")
    with pytest.raises(ValueError, match="reads activations of width 13, but the samples have width 12"):
        absorption(data, wide, "abc", settings=few)
    with pytest.raises(ValueError, match=r"probe: got weights of shape \[3, 5\]; expected \[3, 12\]"):
        absorption(data, sae, "abc", settings=few, probe=LinearProbe(torch.ones(3, 5), torch.ones(3)))
    with pytest.raises(ValueError, match=r"l1_weight_CF: got weights of shape \[2, 30\]; expected \[3, 30\]"):
        absorption(data, sae, "abc", settings=few, l1_weight_CF=torch.ones(2, 30))
    with pytest.raises(ValueError, match="unknown"):
        AbsorptionSettings.model_validate({"unknown": 1})
