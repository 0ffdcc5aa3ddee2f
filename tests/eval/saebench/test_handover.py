"""Handing SAEs to sae-bench, against a fake package that mirrors the calls of the true one, version 0.6.0.

Mirrored: `sae_bench.evals.<name>.main` with its configuration's class and `run_eval(config, selected_saes, device,
output_path, force_rerun=False, …)`, where SCR and TPP add their name to `output_path` and take `clean_up_activations`
and `save_activations`; `general_utils.load_and_format_sae`; the result file's name and envelope; `LLM_NAME_MAP`,
`LLM_NAME_TO_BATCH_SIZE`, `get_module`, `snapshot_download(…, local_dir_use_symlinks=False)`. The true one is run by
`benchmarks/sae_bench_handover.py`.
"""

import importlib
import json
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from c2r.cli import main
from c2r.config.run import ModelConfig
from c2r.eval.core import run_core
from c2r.eval.saebench.evaluation import FOREIGN, _model_name
from c2r.eval.saebench.handover import HandedSAE, check_installed, mended_ravel
from c2r.eval.suite import SUITES, evaluate
from c2r.interop.saelens import load_sae
from c2r.sae.model import SAE, Extra

FAKE = {
    "sae_bench_utils/activation_collection.py": """
LLM_NAME_TO_BATCH_SIZE = {"pythia-160m-deduped": 256}
def get_module(model, layer_num):
    return model.layers[layer_num]
def get_layer_activations(model, target_layer, x):
    seen = []
    def gather(module, inputs, outputs):
        seen.append(outputs[0])
        return outputs
    handle = get_module(model, target_layer).register_forward_hook(gather)
    model(x)
    handle.remove()
    return seen[0]
""",
    "sae_bench_utils/general_utils.py": """
import json, os, re, types
import torch
def load_and_format_sae(sae_release, sae, device):
    norms = torch.norm(sae.W_dec.data, dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    cfg = sae.cfg
    if cfg.hook_layer is None or cfg.hook_name is None or cfg.model_name is None:
        raise ValueError("cfg lacks its place")
    cfg.architecture_str = cfg.architecture() if callable(cfg.architecture) else cfg.architecture
    cfg.metadata = types.SimpleNamespace(hook_layer=cfg.hook_layer)
    return "custom_sae", sae, None
def finish(config, eval_type, metrics, selected_saes, device, output_path):
    os.makedirs(output_path, exist_ok=True)
    os.makedirs("artifacts/fake", exist_ok=True)
    for name, given in selected_saes:
        sae_id, sae, _ = load_and_format_sae(name, given, device)
        sae = sae.to(device=device, dtype=getattr(torch, config.llm_dtype))
        x = torch.randn(5, sae.W_enc.shape[0], dtype=sae.dtype)
        z = sae.encode(x)
        assert z.shape == (5, sae.W_dec.shape[0]) and z.shape[1] == sae.cfg.d_sae
        assert torch.equal(sae(x), sae.decode(z)) and sae.b_enc.shape == (sae.cfg.d_sae,)
        path = os.path.join(output_path, f"{name}_{sae_id}_eval_results.json".replace("/", "_"))
        result = {"eval_type_id": eval_type, "eval_config": config.__dict__, "eval_id": "1",
            "datetime_epoch_millis": 0, "eval_result_metrics": metrics, "eval_result_details": [{"a": 1}],
            "sae_bench_commit_hash": "Unknown", "sae_lens_id": sae_id, "sae_lens_release_id": name,
            "sae_lens_version": "6", "sae_cfg_dict": sae.cfg.to_dict(), "eval_result_unstructured": {"per_class": 2.0}}
        with open(path, "w") as file:
            json.dump(result, file, default=str)
    torch.set_grad_enabled(False)
""",
    "evals/ravel/instance.py": """
def _snapshot_download(repo_id, *, repo_type=None, local_dir=None, allow_patterns=None):
    return f"{repo_id} in {local_dir}"
snapshot_download = _snapshot_download
def load_files():
    return snapshot_download(repo_id="r", repo_type="dataset", local_dir="d", local_dir_use_symlinks=False,
        allow_patterns="*.json")
""",
    "evals/ravel/main.py": """
from dataclasses import dataclass
import jaxtyping, torch
import sae_bench.sae_bench_utils.general_utils as general_utils
import sae_bench.sae_bench_utils.activation_collection as activation_collection
import sae_bench.evals.ravel.instance as instance
LLM_NAME_MAP = {"gemma-2-2b": "google/gemma-2-2b", "pythia-160m-deduped": "EleutherAI/pythia-160m-deduped"}
@dataclass
class RAVELEvalConfig:
    model_name: str = "gemma-2-2b"
    random_seed: int = 42
    llm_batch_size: int = 2048
    llm_dtype: str = "bfloat16"
    artifact_dir: str = "artifacts/ravel"
def run_eval(config, selected_saes, device, output_path, force_rerun=False, artifacts_path="artifacts"):
    config.model_name = LLM_NAME_MAP[config.model_name]
    assert instance.load_files() == "r in d" and torch.is_grad_enabled() and jaxtyping.config.jaxtyping_disable
    general_utils.finish(config, "ravel", {"ravel": {"disentanglement_score": 0.5, "cause_score": 0.4,
        "isolation_score": 0.6}}, selected_saes, device, output_path)
""",
    "evals/scr_and_tpp/main.py": """
import os
from dataclasses import dataclass
import sae_bench.sae_bench_utils.general_utils as general_utils
@dataclass
class ScrAndTppEvalConfig:
    random_seed: int = 42
    perform_scr: bool = True
    llm_batch_size: int = None
    llm_dtype: str = ""
    model_name: str = ""
def run_eval(config, selected_saes, device, output_path, force_rerun=False, clean_up_activations=False,
        save_activations=True, artifacts_path="artifacts"):
    assert force_rerun and clean_up_activations and not save_activations
    kind = "scr" if config.perform_scr else "tpp"
    figure = "scr_metric_threshold_20" if config.perform_scr else "tpp_threshold_20_total_metric"
    general_utils.finish(config, kind, {f"{kind}_metrics": {figure: 0.25}}, selected_saes, device,
        os.path.join(output_path, kind))
""",
    "evals/absorption/main.py": """
from dataclasses import dataclass
@dataclass
class AbsorptionEvalConfig:
    model_name: str = ""
    random_seed: int = 42
    llm_batch_size: int = None
    llm_dtype: str = ""
def run_eval(config, selected_saes, device, output_path, force_rerun=False):
    print("too few letters")
""",
    "evals/sparse_probing/main.py": """
from dataclasses import dataclass
@dataclass
class SparseProbingEvalConfig:
    model_name: str = ""
    random_seed: int = 42
    llm_batch_size: int = None
    llm_dtype: str = ""
def run_eval(config, selected_saes, device, output_path, force_rerun=False, clean_up_activations=False,
        save_activations=True, artifacts_path="artifacts"):
    raise AssertionError("probes of its own")
""",
    "evals/meta_structure/main.py": """
from dataclasses import dataclass
import sae_bench.sae_bench_utils.general_utils as general_utils
@dataclass
class MetaStructureEvalConfig:
    random_seed: int = 42
    llm_dtype = "float32"
def run_eval(config, selected_saes, device, output_path, force_rerun=False):
    general_utils.finish(config, "meta_structure_decoder_variance", {"meta_structure":
        {"decoder_fraction_variance_explained": 0.75}}, selected_saes, device, output_path)
""",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake package, found by imports and by `importlib.metadata`."""
    home = tmp_path / "site"
    for name, text in FAKE.items():
        path = home / "sae_bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in (path.parent, path.parent.parent, home / "sae_bench"):
            (folder / "__init__.py").touch()  # a namespace package would give way to an installed one
    info = home / "sae_bench-0.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sae-bench\nVersion: 0.6.0\n")
    monkeypatch.syspath_prepend(str(home))
    for name in [name for name in sys.modules if name.split(".")[0] == "sae_bench"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return home


@pytest.fixture
def pythia(tiny_models: dict[str, Path], tiny_run: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two trained SAEs that say they were trained on Pythia 160M, whose name leads to a tiny model."""
    monkeypatch.setattr("c2r.language_model.model.model_path", lambda _: str(tiny_models["gpt_neox"]))
    for folder in tiny_run.values():
        config = json.loads((folder / "cfg.json").read_text())
        config["c2r"]["model"]["name"] = "EleutherAI/pythia-160m-deduped"
        (folder / "cfg.json").write_text(json.dumps(config))
    return list(tiny_run.values())


def result_of(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / f"{name}.json").read_text())


def test_ravel_is_filed_beside_ours(
    fake: Path, pythia: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("C2R_CACHE", "kept")
    checked = jaxtyping.config.jaxtyping_disable
    arguments = [str(folder) for folder in pythia]
    main(["eval", *arguments, "--suite", "core,saebench:ravel", "--tokens", "100", "--out", "out", "--seed", "7"])
    assert "RAVEL, disentanglement (sae-bench)" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{sae}_{name}.json" for sae in ("baseline", "c2r") for name in ("core", "saebench_ravel")
    }
    result = result_of(tmp_path / "out", "c2r_saebench_ravel")
    assert result["eval_type_id"] == "ravel"
    assert result["sae_lens_id"] == "c2r"
    assert result["eval_result_metrics"]["ravel"]["disentanglement_score"] == 0.5
    assert result["eval_result_details"] == [{"a": 1}]
    config = result["eval_config"]
    assert config["model_name"] == "EleutherAI/pythia-160m-deduped"
    assert config["llm_batch_size"] == 64
    assert (config["random_seed"], config["llm_dtype"], config["tokens"], config["data"]) == (7, "float32", None, None)
    unstructured = result["eval_result_unstructured"]
    assert unstructured["per_class"] == 2.0
    assert unstructured["sae_bench_version"] == "0.6.0"
    assert unstructured["warning"] is None
    # What sae-bench leaves behind is in the cache, and what it changed is as before.
    assert (tmp_path / "kept" / "sae_bench" / "artifacts" / "fake").is_dir()
    assert not (tmp_path / "artifacts").exists()
    assert Path.cwd() == tmp_path
    assert torch.is_grad_enabled()
    assert jaxtyping.config.jaxtyping_disable == checked


@pytest.mark.parametrize("which", ["tpp", "scr"])
def test_tpp_and_scr_carry_their_warning(
    which: str, fake: Path, pythia: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["eval", str(pythia[0]), "--suite", f"saebench:{which}", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "2605.18229" in printed.err
    assert "unreliable" in printed.out
    result = result_of(tmp_path / "out", f"baseline_saebench_{which}")
    assert result["eval_type_id"] == which
    assert "unreliable" in result["eval_result_unstructured"]["warning"]
    assert "2605.18229" in result["eval_result_unstructured"]["warning"]
    assert result["eval_config"]["perform_scr"] == (which == "scr")
    assert result["eval_config"]["llm_batch_size"] == 256
    assert result["eval_result_unstructured"]["summary"] == {f"saebench_{which}": 0.25}


def test_failures_are_told_and_stop_nothing(
    fake: Path, pythia: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = ("saebench:absorption", "saebench:sparse_probing", "saebench:meta_structure")
    monkeypatch.setattr("c2r.eval.suite.load_language_model", None)  # sae-bench loads its own, and no text is read
    failed = "\n".join(evaluate([pythia[0]], tmp_path / "out", suites=suites).failed)
    assert "saebench:absorption: ValueError: sae-bench wrote no result" in failed
    assert "sae-bench 0.6.0: AssertionError: probes of its own" in failed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["baseline_saebench_meta_structure.json"]


def test_without_sae_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SystemExit):
        main(["eval", "nowhere", "--suite", "saebench:ravel"])
    assert "pip install 'c2r[saebench]'" in capsys.readouterr().err


def test_another_version(fake: Path) -> None:
    info = fake / "sae_bench-0.6.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sae-bench\nVersion: 0.4.2\n")
    with pytest.raises(ValueError, match=r"needs sae-bench 0\.6\.x, but 0\.4\.2 is installed"):
        check_installed()


@pytest.mark.parametrize(
    ("which", "model", "says"),
    [
        ("ravel", ModelConfig(name="openai-community/gpt2"), "RAVEL accepts google/gemma-2-2b"),
        ("ravel", ModelConfig(name="google/gemma-2-2b", hook="mlp_out"), "accepts 'resid_post'"),
        ("tpp", ModelConfig(), "'embedded'; sae-bench accepts names"),
        ("tpp", ModelConfig(name="."), "'.'; sae-bench accepts names"),
        ("tpp", ModelConfig(name="gpt2", revision="abc"), "model.revision: got 'abc'"),
    ],
)
def test_models_that_sae_bench_cannot_read(which: str, model: ModelConfig, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _model_name(which, {"gemma-2-2b": "google/gemma-2-2b"}, {}, model)


def test_models_by_their_names() -> None:
    tables = {"gemma-2-2b": "google/gemma-2-2b"}, {"gemma-2-2b": 32}
    gemma = ModelConfig(name="google/gemma-2-2b")
    assert _model_name("ravel", *tables, gemma) == "gemma-2-2b"
    assert _model_name("scr", *tables, gemma) == "gemma-2-2b"
    assert _model_name("scr", *tables, ModelConfig(name="Qwen/Qwen3-1.7B")) == "Qwen/Qwen3-1.7B"
    assert _model_name("meta_structure", *tables, ModelConfig()) == "embedded"
    assert {f"saebench:{name}" for name in FOREIGN} == {name for name in SUITES if name.startswith("saebench:")}
    assert SUITES["core"].run is run_core


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_what_is_handed_over(architecture: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(12, 6, generator=generator), torch.randn(12, 6, generator=generator)
    extras = {
        "standard": Extra(),
        "jumprelu": Extra(threshold=torch.full((12,), 0.1)),
        "topk": Extra(k=3),
        "gated": Extra(r_mag=torch.zeros(12), b_mag=torch.zeros(12)),
    }
    sae = SAE(W_enc, torch.zeros(12), W_dec, torch.ones(6), architecture=architecture, extra=extras[architecture])
    handed = HandedSAE(sae, ModelConfig(name="m", layer=3, hook="mlp_out"), "m")
    x = torch.randn(2, 4, 6, generator=generator)
    assert torch.equal(handed.W_enc, W_enc.T)
    assert torch.equal(handed.encode(x), sae.encode(x))
    assert torch.equal(handed(x), sae.decode(sae.encode(x)))
    assert handed.cfg.hook_name == "blocks.3.hook_mlp_out"
    assert handed.cfg.to_dict()["d_sae"] == 12
    half = handed.to(device="cpu", dtype=torch.bfloat16)
    assert half.encode(x).dtype == half.decode(half.encode(x)).dtype == half.dtype == torch.bfloat16
    assert sae.W_dec.dtype == torch.float32  # the one that was given is as it was


@pytest.mark.parametrize("as_tuple", [False, True])
def test_ravel_reads_blocks_of_either_kind(fake: Path, as_tuple: bool) -> None:
    """Its hooks expect tuples, and change what the block gives on; transformers 5 returns the tensor itself."""

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return (x + 1, None) if as_tuple else x + 1

    class Model(torch.nn.Module):
        layers = torch.nn.ModuleList([Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            given = self.layers[0](x)
            return given[0] if isinstance(given, tuple) else given

    activations = importlib.import_module("sae_bench.sae_bench_utils.activation_collection")
    instance = importlib.import_module("sae_bench.evals.ravel.instance")
    with pytest.raises(TypeError, match="local_dir_use_symlinks"):
        instance.load_files()
    before, model, x = activations.get_module, Model(), torch.zeros(2, 3)
    with mended_ravel():
        assert torch.equal(activations.get_layer_activations(model, 0, x), x + 1)
        block = activations.get_module(model, 0)
        handle = block.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * 5, *outputs[1:]))
        assert torch.equal(model(x), (x + 1) * 5)
        handle.remove()
        handle = block.register_forward_hook(lambda module, inputs, outputs: None)
        assert torch.equal(model(x), x + 1)
        handle.remove()
        assert instance.load_files() == "r in d"
    assert activations.get_module is before
    with pytest.raises(TypeError, match="local_dir_use_symlinks"):
        instance.load_files()


def test_an_sae_folder_can_be_handed_over(pythia: list[Path]) -> None:
    sae = load_sae(pythia[0])
    assert HandedSAE(sae, ModelConfig(), "m").cfg.context_size == 16
