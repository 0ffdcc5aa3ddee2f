"""SAE folders: what SAELens reads, what is read back, and that a failing save leaves nothing half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import c2r
from c2r.interop import saelens
from c2r.interop.saelens import load_sae, save_sae
from c2r.sae.model import SAE, Extra


def random_sae(scale: float = 1.0) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(12, 5, generator=generator) * scale for _ in range(2))
    return SAE(
        W_enc, torch.randn(12, generator=generator), W_dec, torch.randn(5, generator=generator),
        architecture="jumprelu", extra=Extra(threshold=torch.rand(12, generator=generator)),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_a_saved_sae_computes_the_same(scale: float, tmp_path: Path) -> None:
    sae = random_sae(scale)
    save_sae(sae, tmp_path / "sae", metadata={"model_name": "m"}, c2r={"a": 1})
    loaded = c2r.load(tmp_path / "sae")
    x = torch.randn(50, 5)
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5 * scale**2)  # rows are brought to unit norm
    assert torch.equal(loaded.encode(x) > 0, sae.encode(x) > 0)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(12))


def test_folder_is_what_saelens_reads(tmp_path: Path) -> None:
    save_sae(
        random_sae(), tmp_path / "sae", metadata={"model_name": "m", "hook_name": "blocks.1.hook_resid_post"}, c2r={}
    )
    assert {p.name for p in (tmp_path / "sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert {k: config[k] for k in ("architecture", "d_in", "d_sae", "dtype", "normalize_activations")} == {
        "architecture": "jumprelu", "d_in": 5, "d_sae": 12, "dtype": "float32", "normalize_activations": "none",
    }  # fmt: skip
    assert config["apply_b_dec_to_input"] is True
    assert config["metadata"]["sae_lens_version"]
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "sae" / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (5, 12), "b_enc": (12,), "W_dec": (12, 5), "b_dec": (5,), "threshold": (12,)}


def test_a_failing_save_leaves_no_folder_and_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sae(random_sae(), tmp_path / "sae", metadata={}, c2r={"version": 1})

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    original = Path.rename

    def fail_at_the_last(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return original(self, target)

    for name in ("sae", "new"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail_at_the_last)
            with pytest.raises(KeyboardInterrupt):
                save_sae(random_sae(2.0), tmp_path / name, metadata={}, c2r={"version": 2})
    for point in ("save_file", "_replace"):
        with monkeypatch.context() as patch:
            patch.setattr(saelens, point, fail)
            for name in ("sae", "new"):
                with pytest.raises(KeyboardInterrupt):
                    save_sae(random_sae(2.0), tmp_path / name, metadata={}, c2r={"version": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    assert load_sae(tmp_path / "sae").config["c2r"] == {"version": 1}
    save_sae(random_sae(2.0), tmp_path / "sae", metadata={}, c2r={"version": 3})
    assert load_sae(tmp_path / "sae").config["c2r"] == {"version": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_other_architectures_of_saelens_are_read(architecture: str, tmp_path: Path) -> None:
    tensors = {"W_enc": torch.randn(4, 6), "b_enc": torch.randn(6), "W_dec": torch.randn(6, 4), "b_dec": torch.randn(4)}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {"architecture": architecture, "d_in": 4, "d_sae": 6, "k": 2, "apply_b_dec_to_input": False}
    if architecture == "standard":
        del config["k"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    x = torch.randn(20, 4)
    acts = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
    if architecture == "topk":
        acts = acts * (acts >= acts.topk(2).values[:, -1:])
    torch.testing.assert_close(load_sae(tmp_path).encode(x), acts)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "cfg.json").unlink(), r"no cfg\.json"),
        (lambda p: (p / "cfg.json").write_text("{"), "damaged"),
        (lambda p: (p / "sae_weights.safetensors").write_bytes(b"\x10" * 40), "damaged"),
        (lambda p: (p / "cfg.json").write_text('{"architecture": "crosscoder"}'), "'crosscoder'; read are standard"),
        (lambda p: (p / "cfg.json").write_text('{"architecture": "standard"}'), "expected the tensors"),
        (
            lambda p: (p / "cfg.json").write_text('{"architecture": "jumprelu", "d_in": 12, "d_sae": 5}'),
            r"W_enc is \[5, 12\], cfg.json says \[12, 5\]|is \[.*cfg.json says",
        ),
    ],
)
def test_damaged_folders_are_named(damage: Any, says: str, tmp_path: Path) -> None:
    save_sae(random_sae(), tmp_path / "sae", metadata={}, c2r={})
    damage(tmp_path / "sae")
    with pytest.raises(ValueError, match=says):
        load_sae(tmp_path / "sae")


@pytest.mark.parametrize("architecture", ["standard", "topk", "gated"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_of_any_precision(architecture: Any, subtract: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec, x = (torch.randn(rows, 8, generator=g) for rows in (12, 12, 30))
    extra = {
        "standard": Extra(),
        "topk": Extra(k=3, rank=torch.rand(12, generator=g) + 0.5),
        "gated": Extra(r_mag=torch.zeros(12), b_mag=torch.zeros(12)),
    }[architecture]
    sae = SAE(W_enc, torch.zeros(12), W_dec, torch.ones(8), architecture=architecture, extra=extra,
              subtract_b_dec=subtract).requires_grad_(False)  # fmt: skip
    expected = sae.encode(x.to(dtype).float())
    assert torch.equal(sae.encode(x.to(dtype)), expected)  # in the weights' precision
    assert sae(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(sae(x.to(dtype)).float(), sae.decode(expected), rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae.encode(x), sae.encode(x.float()))
        assert sae(x).dtype == torch.float32
    low = sae.to(dtype)
    assert low.encode(x).dtype == low(x.to(dtype)).dtype == dtype
    assert low(x).dtype == torch.float32


def test_whole_numbers_and_other_widths_are_no_activations(unchecked: None) -> None:
    sae = random_sae()
    for x in (torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 4)):
        with pytest.raises(
            ValueError, match=r"activations: got torch.* expected floating-point numbers \[..., 5\]"
        ):
            sae.encode(x)


def broken(name: str, value: float) -> SAE:
    sae = random_sae().requires_grad_(False)
    getattr(sae, name).view(-1)[0] = value
    return sae


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_dec"])
def test_no_weight_that_is_no_number_counts_as_firing(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: 1 of \d+ numbers are NaN or infinite"):
        broken(name, value).encode(torch.randn(4, 5))


def test_no_activation_that_is_no_number_counts_as_firing() -> None:
    x = torch.randn(4, 5)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match="activations of the model: 1 of 20 numbers are NaN or infinite"):
        random_sae().encode(x)
    with pytest.raises(ValueError, match=r"overflowed torch\.float16"):
        random_sae(100.0).to(torch.float16).encode(torch.full((1, 5), 1e4))
    gated = SAE(torch.ones(1, 5), torch.zeros(1), torch.ones(1, 5), torch.zeros(5), architecture="gated",
                extra=Extra(r_mag=torch.full((1,), 200.0), b_mag=torch.zeros(1)))  # fmt: skip
    with pytest.raises(ValueError, match="activations of latents: 1 of 1 numbers"):
        gated.encode(torch.ones(1, 5))
    huge = random_sae(1e20)  # finite all the same, though their sum is not
    assert bool(huge.encode(torch.full((3, 5), 1e18)).isfinite().all())
