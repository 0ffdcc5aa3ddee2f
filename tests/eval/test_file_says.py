"""What an SAE's file says about its model and text is applied, or refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from builders import write_corpus
from c2r.cli import main
from c2r.config.run import ModelConfig
from c2r.eval.provenance import OF_THE_MODEL, SAID, data_of, model_of
from c2r.eval.suite import evaluate
from c2r.interop.saelens import save_sae
from c2r.language_model.model import load_language_model
from c2r.sae.model import SAE

POINT = {"model_name": "m", "hook_name": "blocks.2.hook_resid_post"}


def said(**metadata: Any) -> dict[str, Any]:
    return {"metadata": POINT | metadata}


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"hook_head_index": 0}, "hook_head_index is 0"),
        ({"hook_name_out": "blocks.2.hook_mlp_out"}, "hook_name_out is 'blocks.2.hook_mlp_out'.*transcoder"),
        ({"model_class_name": "CrossCoderModel"}, "model_class_name is 'CrossCoderModel'"),
        ({"seqpos_slice": [5, None]}, r"seqpos_slice is \[5, None\]"),
        (
            {"model_from_pretrained_kwargs": {"checkpoint_index": 7}},
            "model_from_pretrained_kwargs.checkpoint_index is 7",
        ),
        ({"model_from_pretrained_kwargs": {"dtype": "int8"}}, "dtype of the model.*'int8'"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": "yes"}}, "center_writing_weights is 'yes'"),
        ({"hook_layer": 3}, "hook_layer is 3"),
        ({"hook_name": "blocks.2.attn.hook_z"}, "hook_z', attention heads before .*accepted is blocks.N.hook_X"),
        ({"hook_name": "blocks.2.hook_resid_mid"}, "hook_resid_mid', the residual stream between"),
        ({"hook_name": "model.layers.2"}, "'model.layers.2', which is a module.*layer 2, hook resid_post"),
        ({"hook_name": "transformer.h.2.mlp"}, "'transformer.h.2.mlp', which is a module"),
        ({"hook_name": None}, "hook_name: missing"),
        ({"model_name": None}, "model_name: missing"),
    ],
)
def test_what_cannot_be_heeded_is_refused(metadata: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=rf"cfg\.json: .*{names}"):
        model_of(said(**metadata), None)


def test_what_is_heeded() -> None:
    kwargs = {"center_writing_weights": True, "torch_dtype": "torch.bfloat16", "revision": "step3", "fold_ln": True,
              "n_devices": 1, "trust_remote_code": True, "some_flag": False}  # fmt: skip
    model = model_of(said(model_from_pretrained_kwargs=kwargs, seqpos_slice=[None], hook_layer=2), None)
    assert model == ModelConfig(
        name="m", layer=2, dtype="bfloat16", revision="step3", center_writing_weights=True, trust_remote_code=False
    )
    assert model_of(said(model_from_pretrained_kwargs=kwargs), "other").revision is None
    assert model_of(said(model_name="gpt2-small"), None).name == "gpt2"
    assert model_of(said(model_name="pythia-70m-deduped"), None).name == "EleutherAI/pythia-70m-deduped"
    assert model_of(
        {"model_name": "m", "hook_point": "blocks.{layer}.hook_resid_pre", "hook_point_layer": 4}, None
    ) == (ModelConfig(name="m", layer=4, hook="resid_pre"))


def test_every_rule_is_one_of_three() -> None:
    for key, rule in (SAID | OF_THE_MODEL).items():
        assert rule.how in ("heeded", "harmless", "refused"), key
        assert None in rule.allowed


def test_the_hook_point_can_be_given_by_hand() -> None:
    config = said(hook_name="layers.7", hook_head_index=3)
    assert model_of(config, None, layer=7, hook="mlp_out") == ModelConfig(name="m", layer=7, hook="mlp_out")
    assert model_of(said(), None, layer=5).layer == 5
    assert model_of(said(), None, hook="attn_out") == ModelConfig(name="m", layer=2, hook="attn_out")
    for by_hand, names in (({"layer": -1}, "layer: got -1"), ({"hook": "hook_z"}, "hook: got 'hook_z'; accepted are")):
        with pytest.raises(ValueError, match=names):
            model_of(said(), None, **by_hand)


def test_rows_are_made_as_the_file_says() -> None:
    here = {"source": "files", "path": "a.jsonl"}
    read = data_of(said(context_size=64, exclude_special_tokens=[3, 5]), here)
    assert (read.context, read.drop_tokens, read.path) == (64, [3, 5], "a.jsonl")
    assert data_of(said(exclude_special_tokens=True), here).drop_tokens == []
    ours = {"c2r": {"data": here | {"context": 32, "drop_tokens": ["\n", 5], "text_field": "body"}, "model": None}}
    assert data_of(ours, {}).text_field == "body"
    other = data_of(ours, {"source": "files", "path": "b.jsonl"})
    assert (other.path, other.context, other.drop_tokens, other.text_field) == ("b.jsonl", 32, ["\n", 5], "text")
    assert data_of(ours, {"source": "files", "path": "b.jsonl", "drop_tokens": []}).drop_tokens == []


def test_rows_without_bos_where_the_file_says_so() -> None:
    here = {"source": "files", "path": "a.jsonl"}
    assert data_of(said(prepend_bos=False), here).prepend_bos is False
    assert data_of(said(prepend_bos=True), here).prepend_bos is None
    ours = {"c2r": {"data": here | {"prepend_bos": False}, "model": None}}
    assert getattr(data_of(ours, {"source": "files", "path": "b"}), "prepend_bos") is False  # noqa: B009


def test_a_cfg_that_says_nonsense_is_an_error_with_its_file(whole: Path, tmp_path: Path) -> None:
    folder, quiet = tmp_path / "baseline", Console(quiet=True)
    shutil.copytree(whole / "baseline", folder)
    config = json.loads((folder / "cfg.json").read_text())
    foreign = {key: value for key, value in config.items() if key != "c2r"}
    for changed, suite, names in (
        (foreign | {"metadata": None}, "core", "hook_name: missing"),
        (config | {"c2r": {}}, "core", "c2r.model: missing"),
        (config | {"c2r": {"model": {"name": "embedded"}, "sae": {}, "train": {}}}, "core", "c2r.data: missing"),
        (config | {"c2r": {"model": {"name": "embedded", "layer": "top"}, "data": {}}}, "core", "c2r.model.layer"),
        (config | {"c2r": None}, "recovery", "c2r: got null"),
        (config | {"c2r": {"data": []}}, "recovery", r"c2r.data: got \[\]"),
    ):
        (folder / "cfg.json").write_text(json.dumps(changed))
        try:
            said = "\n".join(evaluate([folder], suites=(suite,), tokens=100, console=quiet).failed)
        except ValueError as error:
            said = str(error)
        assert re.search(rf"{folder}/cfg\.json: {names}", said)
    (folder / "cfg.json").write_text(json.dumps(config | {"c2r": {}}))
    (failed,) = evaluate([folder], suites=("recovery",), console=quiet).failed
    assert "recovery needs an SAE trained on known features" in failed


def test_centred_activations_are_what_transformer_lens_leaves(tiny_models: dict[str, Path]) -> None:
    """Its option centres every weight that writes to the stream: activations without their mean, the same logits."""
    ids = torch.arange(20).view(2, 10)
    for family, centred in (("gpt2", True), ("gpt_neox", True), ("llama", False), ("gemma2", False)):
        for hook in ("resid_pre", "resid_post", "mlp_out", "attn_out"):
            section: dict[str, Any] = {"name": str(tiny_models[family]), "layer": 1, "hook": hook}
            raw = load_language_model(ModelConfig.model_validate(section))
            lm = load_language_model(ModelConfig.model_validate(section | {"center_writing_weights": True}))
            x = raw.activations(ids)
            torch.testing.assert_close(
                lm.activations(ids), x - x.mean(-1, keepdim=True) if centred else x, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(lm.logits(ids), raw.logits(ids), rtol=1e-3, atol=1e-4)
            if centred:  # a reconstruction without mean may stand for an activation with one
                spliced = lm.logits(ids, lambda hidden: hidden * 0.5)
                by_hand = raw.logits(ids, lambda h: 0.5 * (h - h.mean(-1, keepdim=True)) + h.mean(-1, keepdim=True))
                torch.testing.assert_close(spliced, by_hand, rtol=1e-3, atol=1e-4)


def test_centring_is_refused_where_the_mean_matters(tiny_models: dict[str, Path]) -> None:
    """A model that calls its norm LayerNorm and does not subtract the mean."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    section = {"name": str(tiny_models["llama"]), "center_writing_weights": True}
    name = LlamaRMSNorm.__name__
    try:
        LlamaRMSNorm.__name__ = "ScaleNorm"
        with pytest.raises(ValueError, match=r"model\.center_writing_weights: the output of .* depends on the mean"):
            load_language_model(ModelConfig.model_validate(section))
    finally:
        LlamaRMSNorm.__name__ = name


def test_an_sae_of_centred_activations_is_measured_on_them(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Exact on what has no mean over coordinates; on the raw stream it would miss the mean."""
    rows = torch.linalg.qr(torch.cat([torch.ones(16, 1), torch.eye(16)[:, :15]], 1)).Q[:, 1:].T
    both = torch.cat([rows, -rows])
    sae = SAE(both.clone(), torch.zeros(30), both, torch.zeros(16), architecture="standard")
    found = {}
    for center in (True, False):
        metadata = {"model_name": str(tiny_models["gpt2"]), "hook_name": "blocks.1.hook_resid_post", "context_size": 16,
                    "model_from_pretrained_kwargs": {"center_writing_weights": center}}  # fmt: skip
        save_sae(sae, tmp_path / f"sae_{center}", metadata=metadata, c2r={})
        config = json.loads((tmp_path / f"sae_{center}" / "cfg.json").read_text())
        del config["c2r"]
        (tmp_path / f"sae_{center}" / "cfg.json").write_text(json.dumps(config))
        text = {"source": "files", "path": str(write_corpus(tmp_path / "text"))}
        folder, quiet = tmp_path / f"sae_{center}", Console(quiet=True)
        found[center] = evaluate([folder], suites=("core",), tokens=400, data=text, console=quiet)[folder.name]
    assert found[True]["ev"] == pytest.approx(1, abs=1e-5)
    assert found[True]["ce_recovered"] == pytest.approx(1, abs=1e-3)
    assert (found[False]["ev"] or 0) < 0.999


def test_the_command_line_takes_the_hook_point(
    tiny_run: dict[str, Path], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_run["c2r"]
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "model.layers.1"
    config["metadata"]["model_name"] = config.pop("c2r")["model"]["name"]
    (folder / "cfg.json").write_text(json.dumps(config))
    rest = ["--suite", "core", "--tokens", "300", "--path", str(corpus)]
    with pytest.raises(SystemExit):
        main(["eval", str(folder), *rest])
    assert "cannot tell the hook point from hook_name 'model.layers.1'" in capsys.readouterr().err
    main(["eval", str(folder), *rest, "--layer", "1", "--hook", "resid_post"])
    result = json.loads((folder.parent / "evaluations" / "c2r_core.json").read_text())
    assert result["eval_config"]["model"]["layer"] == 1
