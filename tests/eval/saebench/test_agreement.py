"""Numbers of sae-bench 0.6.0's own code on the embedded model and a small SAE (`benchmarks/agree_saebench.py`)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from builders import ROOT, bench_of
from c2r.config.evaluations import FirstLetterSettings
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.absorption.concepts import Absorption, absorption
from c2r.eval.absorption.first_letter import LETTERS, Collection, collect, words_of
from c2r.eval.absorption.probes import LinearProbe
from c2r.eval.core import Fidelity, evaluate_core
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.sae.model import SAE, Extra
from c2r.text.packing import Rows

GOLDEN = Path(os.environ.get("C2R_GOLDEN_DIR", ROOT / "tests" / "golden"))
if not (GOLDEN / "saebench.json").is_file():
    pytest.skip(f"{GOLDEN} has no saebench.json", allow_module_level=True)
EXPECTED = json.loads((GOLDEN / "saebench.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return load_file(GOLDEN / "saebench.safetensors")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(ModelConfig())


@pytest.fixture(scope="module")
def sae(arrays: dict[str, Tensor]) -> SAE:
    weights = [arrays[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    return SAE(*weights, architecture="jumprelu", extra=Extra(threshold=arrays["threshold"]))


def test_core(lm: LanguageModel, sae: SAE, arrays: dict[str, Tensor]) -> None:
    rows = [Rows(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in arrays["ids"]]
    categories = evaluate_core(lm, {"sae": sae}, rows)["sae"].core.values()
    found = {name: value for category in categories for name, value in category.items()}
    # Its mean over batches of ratios, where ours is the ratio of means over all tokens.
    biases = []
    for ids in arrays["ids"]:
        counted, x_nD = Fidelity(sae.width, sae.d_in), lm.activations(ids).flatten(0, 1)
        counted.add(x_nD, sae(x_nD), sae.encode(x_nD))
        biases.append(counted.metrics()["relative_reconstruction_bias"])
    found["relative_reconstruction_bias"] = sum(biases) / len(biases)
    assert len(EXPECTED["core"]) == 16
    for name, value in EXPECTED["core"].items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@pytest.fixture(scope="module")
def letters(
    lm: LanguageModel, sae: SAE, arrays: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Absorption, Collection]:
    bench = bench_of(lm, ModelConfig(), DataConfig(), 1, 0, tmp_path_factory.mktemp("x"))
    words = words_of(lm.tokenizer, "spaced")
    with pytest.MonkeyPatch.context() as without:  # the probe is given
        without.setattr("c2r.eval.absorption.first_letter.one_vs_rest_probe", lambda *_, **__: probe)
        probe = LinearProbe(arrays["probe.weight"], arrays["probe.bias"])
        part = collect(bench, words, FirstLetterSettings.model_validate(EXPECTED["prompts"]), 0)
    return absorption(part.data, sae, LETTERS, probe=part.probe, l1_weight_CF=arrays["l1"]), part


def test_absorption_of_each_letter(letters: tuple[Absorption, Any]) -> None:
    for found in letters[0].classes:
        expected = EXPECTED["letters"][found.name]
        assert found.probe_f1 == pytest.approx(expected["probe_f1"], abs=1e-6)
        assert found.f1_by_k == pytest.approx(expected["f1_by_k"], abs=0.01)
        if found.probe_f1 > 0.6:
            assert found.split_latents == expected["split_latents"]


def test_absorption_of_each_word(letters: tuple[Absorption, Collection]) -> None:
    result, part = letters
    words = part.words[len(part.data.y_train_B) :]
    scored = zip(*(values.tolist() for values in result.scored), strict=True)
    found = {words[i]: (fraction, full) for i, _, fraction, full in scored}
    assert found.keys() == EXPECTED["words"].keys()
    for word, (fraction, full) in EXPECTED["words"].items():
        assert found[word][0] == pytest.approx(fraction, abs=1e-6), word
        assert found[word][1] == full
