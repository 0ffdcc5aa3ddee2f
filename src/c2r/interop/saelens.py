"""SAELens's folder, which is also the one c2r writes: `cfg.json` and `sae_weights.safetensors`.

Layout there: `W_enc [D, F]`, `W_dec [F, D]`. Ours is latent-major and is turned at this border and nowhere else.
c2r's own settings ride along in `cfg.json` under `c2r`, which SAELens ignores.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from c2r.sae.base import SAE, Extra

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The version whose format this is. Without one in the metadata, SAELens discards the metadata."""
_COMMON = {"W_enc", "W_dec", "b_dec"}
_TENSORS: dict[str, set[str]] = {
    "standard": _COMMON | {"b_enc"},
    "topk": _COMMON | {"b_enc"},
    "jumprelu": _COMMON | {"b_enc", "threshold"},
    "gated": _COMMON | {"b_gate", "r_mag", "b_mag"},
    "abs_topk": _COMMON | {"b_enc"},
}
"""By architecture. SAELens knows all but abs_topk, which is ours."""
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def save_sae(sae: SAE, folder: Path, *, metadata: dict[str, Any], c2r: dict[str, Any]) -> None:
    """Write the SAE folder, decoder rows at unit norm; whole or not at all.

    Arguments:
        metadata: what SAELens keeps of an SAE's origin (`model_name`, `hook_name`, `context_size`, …).
        c2r: our own settings and the numbers found in training.
    """
    with torch.no_grad():
        norm_F = sae.W_dec.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        tensors = {"W_dec": sae.W_dec / norm_F[:, None], "b_dec": sae.b_dec}
        if sae.r_mag is not None and sae.b_mag is not None:
            # The norm goes to the magnitude; the gate only compares with 0.
            tensors |= {"W_enc": sae.W_enc.T, "b_gate": sae.b_enc}
            tensors |= {"r_mag": sae.r_mag + norm_F.log(), "b_mag": sae.b_mag * norm_F}
        else:
            tensors |= {"W_enc": (sae.W_enc * norm_F[:, None]).T, "b_enc": sae.b_enc * norm_F}
        if sae.threshold is not None:
            tensors["threshold"] = sae.threshold * norm_F
    config = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.width,
        "dtype": "float32",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": "none",
        **({"k": sae.k} if sae.k is not None else {}),
        "metadata": {"sae_lens_version": SAELENS_VERSION, "hook_head_index": None, **metadata},
        "c2r": c2r,
    }
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        save_file({k: v.detach().cpu().float().contiguous() for k, v in tensors.items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_sae(path: str | Path) -> SAE:
    """Read an SAE folder that c2r or SAELens wrote (architectures standard, topk, jumprelu, gated, abs_topk).

    Raises:
        ValueError: no such folder, a damaged or foreign file, a pickle in place of the weights (it is not opened), or
            an architecture that is not read yet.
    """
    folder = Path(path).expanduser()
    _refuse_pickles(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not an SAE folder; it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged SAE folder: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/{CONFIG}: expected an object, got {type(config).__name__}")
    architecture = config.get("architecture")
    if architecture not in _TENSORS:
        raise ValueError(f"{folder}/{CONFIG}: architecture is {architecture!r}; read are {', '.join(_TENSORS)}")
    if set(tensors) != _TENSORS[architecture]:
        raise ValueError(
            f"{folder}/{WEIGHTS}: expected the tensors {sorted(_TENSORS[architecture])}, found {sorted(tensors)}"
        )
    d_in, width = config.get("d_in"), config.get("d_sae")
    shapes = {"W_enc": (d_in, width), "W_dec": (width, d_in), "b_dec": (d_in,)}
    for name, tensor in tensors.items():
        shape = shapes.get(name, (width,))
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{folder}/{WEIGHTS}: {name} is {list(tensor.shape)}, {CONFIG} says {list(shape)}")
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") != "none":
            raise ValueError(f"{folder}/{CONFIG}: {key} is {config[key]!r}; only 'none' is read")
    unit = torch.ones(tensors["W_dec"].shape[0])
    if config.get("rescale_acts_by_decoder_norm") and not torch.allclose(tensors["W_dec"].float().norm(dim=1), unit):
        raise ValueError(
            f"{folder}/{CONFIG}: rescale_acts_by_decoder_norm with rows that are not of unit norm is not read"
        )
    by_name = {name: tensor.float() for name, tensor in tensors.items()}
    k = config.get("k") if architecture in ("topk", "abs_topk") else None
    return SAE(
        by_name["W_enc"].T.contiguous(),
        by_name["b_gate" if architecture == "gated" else "b_enc"],
        by_name["W_dec"],
        by_name["b_dec"],
        architecture=architecture,
        extra=Extra(by_name.get("threshold"), by_name.get("r_mag"), by_name.get("b_mag"), k),
        subtract_b_dec=config.get("apply_b_dec_to_input", True),
        config=config,
    ).requires_grad_(False)


def _refuse_pickles(folder: Path) -> None:
    """Tell of a pickle where the weights should be: opening one can run code."""
    candidates = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.*"))
    for path in candidates:
        # safetensors opens with the length of its header, whose upper bytes are 0, and then with the header.
        with path.open("rb") as file:
            head = file.read(9)
        pickled = head.startswith((b"PK\x03\x04", b"\x80")) and head[8:] != b"{"
        if pickled or (path.suffix in _PICKLES and path.name != WEIGHTS):
            raise ValueError(
                f"{folder}: {path.name} is a pickle, which could run code and was not opened; c2r reads safetensors"
            )


def _replace(partial: Path, folder: Path) -> None:
    """Put a finished folder in place of an older one, which goes only when the new one stands.

    What else lies in the older one, which may be any folder of a user's, moves to the new one.
    """
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    old = None
    if folder.exists():
        old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    if old is not None:
        for path in old.iterdir() if old.is_dir() else ():
            if path.name not in (CONFIG, WEIGHTS):
                path.rename(folder / path.name)
        old.unlink() if old.is_symlink() or not old.is_dir() else shutil.rmtree(old)
