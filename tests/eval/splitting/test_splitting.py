"""The splitting evaluation as it is written: a latent duplicated by hand, and composition beside its floor."""

import json
from pathlib import Path

import pytest
import torch

from c2r.eval.suite import evaluate
from c2r.interop.saelens import load_sae, save_sae


def test_a_duplicate_is_shown_to_the_reader(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_run["baseline"]
    sae = load_sae(folder)
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.threshold):
            assert tensor is not None
            tensor[20] = tensor[3]
    save_sae(sae, tmp_path / "twin", metadata=sae.config["metadata"], c2r=sae.config["c2r"])
    shown = evaluate([folder, tmp_path / "twin"], suites=("splitting",), tokens=400, cache=tmp_path / "cache")
    found = json.loads((tmp_path / "evaluations" / "twin_splitting.json").read_text())
    first = found["eval_result_details"][0]
    assert sorted(first["latents"]) == [3, 20]
    assert first["among_highest"] == ["cosine", "phi"]
    assert first["cosine"] == pytest.approx(1, abs=1e-5)
    assert first["phi"] == pytest.approx(1)
    assert first["snippets"][0] == first["snippets"][1]
    assert all(set(snippet) == {"before", "token", "after", "activation"} for snippet in first["snippets"][0])
    metrics = found["eval_result_metrics"]
    close = metrics["splitting"]["max_cos_share_over_0_9"] * metrics["composition"]["meta_sae_rows"]
    before = json.loads((tmp_path / "run" / "evaluations" / "baseline_splitting.json").read_text())
    assert close > before["eval_result_metrics"]["splitting"]["max_cos_share_over_0_9"] * 32
    assert round(close) >= 2
    assert 0 < metrics["composition"]["meta_sae_explained_variance"] < 1
    assert shown["twin"]["composition_ev"] == metrics["composition"]["meta_sae_explained_variance"]
    # Co-firing at one cosine: the lower of the two means, for both.
    lower = min(figures["max_cos_mean"] for figures in shown.values())
    assert {figures["matched_cosine"] for figures in shown.values()} == {lower}
    assert metrics["splitting"]["matched_cosine_mean"] == pytest.approx(lower, abs=0.05)
    assert metrics["splitting"]["matched_phi"] == shown["twin"]["matched_phi"]
    floors = {figures["composition_ev_random"] for figures in shown.values()}
    assert len(list((tmp_path / "cache").glob("composition-*"))) == len(floors)  # one a shape
