"""Warm start from an existing SAE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from builders import known_run, run_config, write_corpus
from c2r.config.run import TrainConfig
from c2r.eval.suite import model_of
from c2r.interop.saelens import load_sae, save_sae
from c2r.language_model.model import load_language_model
from c2r.methods import METHODS
from c2r.training.run import Run
from c2r.training.trainer import train
from c2r.training.warm_start import check_start, starting_weights
from small_runs import TREE, configured, fresh, trained


def saved(tmp_path: Path, method: str, **changes: Any) -> Path:
    save_sae(trained(method, 60, **changes).export(3.0), tmp_path / method, metadata={}, c2r={})
    return tmp_path / method


@pytest.mark.parametrize(
    ("source", "method"),
    [("standard", "standard"), ("gated", "gated"), ("jump_relu", "jump_relu"), ("jump_relu", "batch_top_k"),
     ("batch_top_k", "jump_relu"), ("april_update", "top_k"), ("ort", "matryoshka_batch_top_k")],
)  # fmt: skip
def test_starting_weights_do_what_the_sae_did(source: str, method: str, tmp_path: Path) -> None:
    config = configured(method, init=str(saved(tmp_path, source)))
    given = check_start(config)
    assert given is not None
    start = starting_weights(given, config, 1 / 3.0)
    x = fresh(100)
    torch.testing.assert_close(start.pre_activations(x), given.pre_activations(3 * x) / 3, rtol=1e-4, atol=1e-5)
    assert start.subtract_b_dec == METHODS[method].subtract_b_dec
    if {source, method} <= {"jump_relu", "batch_top_k"} or source == method:
        if start.architecture == given.architecture:
            torch.testing.assert_close(start(x), given(3 * x) / 3, rtol=1e-4, atol=1e-5)
        if start.threshold is not None and given.threshold is not None:
            torch.testing.assert_close(start.threshold, given.threshold / 3)
    run = Run(config, TrainConfig(tokens=2560, batch=256, lr=1e-9, precision="float32"), TREE.d_in, start=start)
    run.step(x)
    torch.testing.assert_close(run.sae.b_dec, given.b_dec / 3, rtol=1e-4, atol=1e-5)  # no median start


def test_fine_tuning_keeps_what_was_learnt(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    first = train(run_config(tmp_path / "a", tiny_models["llama"], corpus))
    saes = [
        {"name": "tuned", "width": 32, "k": 4, "k_anneal": 0, "init": str(first["baseline"]), "c2r": {"strength": 1}}
    ]
    tuned = train(run_config(tmp_path / "b", tiny_models["llama"], corpus, saes=saes))
    before, after = (load_sae(folder) for folder in (first["baseline"], tuned["tuned"]))
    alike = torch.nn.functional.cosine_similarity(before.W_dec, after.W_dec)
    assert alike.mean() > 0.9
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    started = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["ev"] > next(line for line in started if line["sae"] == "baseline")["ev"]
    assert load_language_model(model_of(after.config, None)).layer == 1


def test_what_cannot_be_started_from_is_named(tmp_path: Path) -> None:
    gated = saved(tmp_path, "gated")
    with pytest.raises(ValueError, match=r"saes\.standard\.init: .*'gated', which method 'standard' cannot start from"):
        check_start(configured("standard", init=str(gated)))
    with pytest.raises(ValueError, match=r"has 24 latents, but width is 12"):
        check_start(configured("gated", init=str(gated), width=12))
    with pytest.raises(ValueError, match=r"saes\.gated\.init: .*not an SAE folder"):
        check_start(configured("gated", init=str(tmp_path)))


def foreign(folder: Path, norms: torch.Tensor, **says: Any) -> Path:
    """An SAELens folder, `standard` unless `says` overrides it, whose decoder rows have these norms."""
    W_dec = torch.nn.functional.normalize(
        torch.randn(len(norms), TREE.d_in, generator=torch.Generator().manual_seed(0))
    )
    folder.mkdir()
    save_file(
        {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(len(norms)), "W_dec": W_dec * norms[:, None],
         "b_dec": torch.zeros(TREE.d_in)}, folder / "sae_weights.safetensors",
    )  # fmt: skip
    metadata = {"model_name": "other/model", "hook_name": "blocks.7.hook_mlp_out"}
    config = {"architecture": "standard", "d_in": TREE.d_in, "d_sae": len(norms), "metadata": metadata} | says
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_what_is_changed_before_training_is_said(tmp_path: Path) -> None:
    norms = torch.linspace(0.5, 2, 24)
    norms[[3, 7]] = 0
    config = configured("standard", init=str(foreign(tmp_path / "sae", norms)))
    console = Console(record=True, width=400)
    run = known_run(tmp_path / "run")
    check_start(config, run, console)
    said = console.export_text()
    assert "saes.standard.init: decoder rows are scaled to unit norm" in said
    assert "2 latents have a zero decoder row and get a random direction (3, 7)" in said
    assert "it was trained with model other/model; this run continues with embedded" in said
    assert "it was trained with hook point blocks.7.hook_mlp_out; this run continues with blocks.0" in said
    check_start(configured("april_update", init=str(tmp_path / "sae")), console=console)
    assert "unit norm" not in console.export_text()


def test_a_choice_that_would_change_at_unit_norm_is_refused(tmp_path: Path) -> None:
    topk = {"architecture": "topk", "k": 3}
    uneven = foreign(tmp_path / "uneven", torch.linspace(0.5, 2, 24), **topk)
    with pytest.raises(
        ValueError, match=r"saes\.top_k\.init: .* norm 0\.5 to 2\. Method 'top_k' keeps the rows at norm 1"
    ):
        check_start(configured("top_k", init=str(uneven)))
    even = foreign(tmp_path / "even", torch.full((24,), 3.0), **topk)
    scaled = foreign(tmp_path / "scaled", torch.linspace(0.5, 2, 24), rescale_acts_by_decoder_norm=True, **topk)
    for method, folder in (("batch_top_k", uneven), ("top_k", even), ("top_k", scaled)):
        assert check_start(configured(method, init=str(folder))) is not None
