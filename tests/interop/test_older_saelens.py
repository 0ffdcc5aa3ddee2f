"""SAE folders of older versions and other libraries: equivalent to the original, or refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from c2r.eval.provenance import model_of
from c2r.interop.saelens import load_sae

D, F = 4, 6
WIDTHS = {"d_in": D, "d_sae": F}


def tensors(**more: Tensor) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    found = {"W_enc": torch.randn(D, F, generator=g), "b_enc": torch.randn(F, generator=g),
             "W_dec": torch.randn(F, D, generator=g), "b_dec": torch.randn(D, generator=g)}  # fmt: skip
    return found | more


def write(folder: Path, weights: dict[str, Tensor], config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


X = torch.randn(30, D, generator=torch.Generator().manual_seed(1))


def by_hand(weights: dict[str, Tensor], k: int | None = None) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction of X, as SAELens's `standard` and `topk` compute them."""
    pre = (X - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    acts = pre.relu()
    if k is not None:
        acts = torch.zeros_like(pre).scatter(-1, (best := pre.topk(k, dim=-1)).indices, best.values.relu())
    return acts, acts @ weights["W_dec"] + weights["b_dec"]


@pytest.mark.parametrize(
    "says",
    [
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}},
        {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 2}},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2.0}},
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}},
        {"architecture": "topk", "k": 2, "activation_fn": "TopK"},
        {"architecture": "topk", "k": 2, "activation_fn_kwargs": {}},
    ],
)
def test_topk_however_it_is_named(says: dict[str, Any], tmp_path: Path) -> None:
    weights = tensors()
    sae = load_sae(write(tmp_path / "a", weights, WIDTHS | says))
    acts, hat = by_hand(weights, 2)
    torch.testing.assert_close(sae.encode(X), acts)
    torch.testing.assert_close(sae(X), hat)
    assert sae.config["architecture"] == "topk"
    assert sae.config["k"] == sae.k == 2


def test_a_flat_configuration_of_before_version_6(tmp_path: Path) -> None:
    flat = WIDTHS | {
        "model_name": "some/model", "hook_point": "blocks.3.hook_mlp_out", "hook_point_layer": 3, "prepend_bos": True,
        "hook_point_head_index": None, "context_size": 64, "dtype": "torch.float32", "device": "cuda",
        "activation_fn_str": "relu", "activation_fn_kwargs": {}, "normalize_activations": False, "l1_coefficient": 1.0,
        "finetuning_scaling_factor": False, "noise_scale": 0.1, "dataset_path": "a/b", "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }  # fmt: skip
    weights = tensors(scaling_factor=torch.ones(F), feature_sparsity=torch.zeros(F), n_forward_passes=torch.tensor(3))
    sae = load_sae(write(tmp_path / "a", weights, flat))
    torch.testing.assert_close(sae(X), by_hand(weights)[1])
    model = model_of(sae.config, None)
    assert (model.name, model.layer, model.hook) == ("some/model", 3, "mlp_out")
    assert model == model_of(flat, None)
    assert sae.config["metadata"]["context_size"] == 64
    assert "hook_point" not in sae.config


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_the_factor_of_fine_tuning_is_folded(name: str, tmp_path: Path) -> None:
    factor = torch.linspace(0.5, 2, F)
    weights = tensors(**{name: factor})
    sae = load_sae(write(tmp_path / "a", weights, WIDTHS | {"finetuning_scaling_factor": True}))
    acts, _ = by_hand(weights)
    torch.testing.assert_close(sae(X), (acts * factor) @ weights["W_dec"] + weights["b_dec"])
    with pytest.raises(ValueError, match=rf"{name} is not 1 everywhere, but finetuning_scaling_factor"):
        load_sae(write(tmp_path / "a", weights, WIDTHS | {"finetuning_scaling_factor": False}))


@pytest.mark.parametrize("subtract", [True, False])
def test_a_stated_input_scale_is_folded(subtract: bool, tmp_path: Path) -> None:
    config = WIDTHS | {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": 0.25}
    weights = tensors()
    sae = load_sae(write(tmp_path / "a", weights, config | {"apply_b_dec_to_input": subtract}))
    pre = (X * 0.25 - weights["b_dec"] * subtract) @ weights["W_enc"] + weights["b_enc"]
    torch.testing.assert_close(sae.encode(X), pre.relu())
    torch.testing.assert_close(sae(X), (pre.relu() @ weights["W_dec"] + weights["b_dec"]) / 0.25)


@pytest.mark.parametrize("shape", [(), (1,), (F,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_thresholds_and_number_formats(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in tensors(threshold=torch.full(shape, 0.5)).items()}
    sae = load_sae(write(tmp_path / "a", weights, WIDTHS | {"architecture": "jumprelu", "dtype": str(dtype)}))
    exact = {name: tensor.float() for name, tensor in weights.items()}
    pre = (X - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"]
    torch.testing.assert_close(sae.encode(X), pre * (pre > 0.5))
    assert all(weight.dtype == torch.float32 for weight in sae.parameters())


def test_a_threshold_kept_as_a_logarithm(tmp_path: Path) -> None:
    weights = tensors(log_threshold=torch.linspace(-2, 0, F))
    sae = load_sae(write(tmp_path / "a", weights, WIDTHS | {"architecture": "jumprelu"}))
    assert sae.threshold is not None
    torch.testing.assert_close(sae.threshold.data, torch.linspace(-2, 0, F).exp())


@pytest.mark.parametrize(
    ("says", "names"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn: got 'tanh-relu'"),
        ({"architecture": "gated", "activation_fn": "topk"}, "activation_fn: got 'topk' with architecture 'gated'"),
        ({"architecture": "topk"}, "k: missing"),
        ({"architecture": "topk", "k": 2, "activation_fn_kwargs": {"k": 3}}, "k is 2 and activation_fn_kwargs.k is 3"),
        ({"architecture": "topk", "k": F + 1}, rf"k: got {F + 1}; accepted are whole numbers from 1 to d_sae, {F}"),
        ({"architecture": "topk", "k": "4"}, "k: got '4'"),
        ({"architecture": "topk", "k": True}, "k: got True"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": "2"}}, "k: got '2'"),
        ({"architecture": "topk", "k": 2, "activation_fn_kwargs": {"postact_fn": "gelu"}}, "postact_fn: got 'gelu'"),
        ({"architecture": "batchtopk"}, "architecture: got 'batchtopk'.*training checkpoint"),
        ({"architecture": "skip_transcoder"}, "architecture: got 'skip_transcoder'.*transcoder"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: got 'layer_norm'.*accepted is 'none'"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations: got 'constant_norm_rescale'"),
        ({"normalize_activations": True}, "normalize_activations: got True.*norm_scaling_factor"),
        ({"normalize_activations": "expected_average_only_in", "norm_scaling_factor": 0}, "norm_scaling_factor: got 0"),
        ({"reshape_activations": "hook_z"}, "reshape_activations: got 'hook_z'"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input: got 'yes'"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"metadata": []}, r"metadata: got \[\]"),
        ({"metadata": {"context_size": "long"}}, "metadata.context_size: got 'long'"),
        ({"hook_name": "a", "metadata": {"hook_name": "b"}}, "metadata.hook_name: got 'b', but hook_name is 'a'"),
        ({"c2r": None}, "c2r: got null"),
        ({"c2r": {"sae": None}}, "c2r.sae: got None"),
        ({"c2r": {"sae": {"k": "many"}}}, "c2r.sae.k"),
        ({"d_sae": None}, r"expected \[None, 4\]|d_sae"),
    ],
)
def test_what_is_not_read_is_named_with_its_file(says: dict[str, Any], names: str, tmp_path: Path) -> None:
    weights = tensors()
    if says.get("architecture") == "gated":
        weights = {name: t for name, t in weights.items() if name != "b_enc"}
        weights |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), torch.zeros(F))
        weights = {name: t.clone() for name, t in weights.items()}
    folder = write(tmp_path / "a", weights, WIDTHS | says)
    with pytest.raises(ValueError, match=names) as raised:
        load_sae(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"W_skip": torch.ones(D, D)}, r"found W_skip \[4, 4\] too"),
        ({"b_dec_out": torch.ones(D)}, "b_dec_out"),
        ({"threshold": torch.ones(F)}, "threshold"),
        ({"rotation": torch.eye(D)}, r"rotation \[4, 4\].*more than one number per latent"),
        ({"b_enc": torch.ones(F, dtype=torch.int32)}, "b_enc: got type torch.int32"),
        ({"b_dec": torch.ones(1, D)}, r"b_dec: got shape \[1, 4\]; expected \[4\]"),
        ({"W_dec": torch.full((F, D), float("nan"))}, "W_dec: 24 of 24 numbers are NaN or infinite"),
        ({"b_enc": torch.tensor([0.0, float("inf"), 0, 0, 0, 0])}, "b_enc: 1 of 6 numbers are NaN or infinite"),
    ],
)
def test_tensors_that_may_change_the_function_are_refused(more: dict[str, Tensor], names: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", tensors(**more), WIDTHS | {"architecture": "standard"})
    with pytest.raises(ValueError, match=names):
        load_sae(folder)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"cfg.json": '{"num_latents": 4, "k": 2}', "sae.safetensors": ""}, r"sparsify.*cannot read yet"),
        ({"ae.pt": "", "config.json": "{}"}, r"dictionary_learning.*cannot read yet"),
        ({"params.npz": "PK\x03\x04"}, r"Gemma Scope.*cannot read yet"),
        ({"hyperparams.json": "{}"}, r"Llama Scope.*cannot read yet"),
        ({"cfg.json": "{}", "sparsity.safetensors": ""}, r"no sae_weights.safetensors; it contains cfg.json, sparsity"),
        ({"one/cfg.json": "{}", "two/cfg.json": "{}"}, r"it contains 2 SAE folders, give one of them: one, two"),
        ({}, r"it contains nothing"),
    ],
)
def test_other_folders_are_recognised(files: dict[str, str], says: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        load_sae(tmp_path)


def test_no_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an SAE folder; there is no such folder"):
        load_sae(tmp_path / "none")
    file = write(tmp_path / "a", tensors(), WIDTHS) / "sae_weights.safetensors"
    with pytest.raises(ValueError, match="not an SAE folder but a file"):
        load_sae(file)
