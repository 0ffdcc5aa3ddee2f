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

from c2r.sae.base import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The version whose format this is. Without one in the metadata, SAELens discards the metadata."""
_TENSORS = {"W_enc", "b_enc", "W_dec", "b_dec"}


def hook_name(layer: int, hook: str) -> str:
    """A hook point in the field's (TransformerLens's) words."""
    return f"blocks.{layer}.hook_{hook}"


def save_sae(sae: SAE, folder: Path, *, metadata: dict[str, Any], c2r: dict[str, Any]) -> None:
    """Write the SAE folder, decoder rows at unit norm; whole or not at all.

    Arguments:
        metadata: what SAELens keeps of an SAE's origin (`model_name`, `hook_name`, `context_size`, …).
        c2r: our own settings and the numbers found in training.
    """
    with torch.no_grad():
        norm_F = sae.W_dec.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        tensors = {
            "W_enc": (sae.W_enc * norm_F[:, None]).T,
            "b_enc": sae.b_enc * norm_F,
            "W_dec": sae.W_dec / norm_F[:, None],
            "b_dec": sae.b_dec,
        }
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
    """Read an SAE folder that c2r or SAELens wrote (architectures standard, topk, jumprelu).

    Raises:
        ValueError: no such folder, a damaged or foreign file, or an architecture that is not read yet.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not an SAE folder; it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged SAE folder: {error}") from error
    architecture = config.get("architecture")
    if architecture not in ("standard", "topk", "jumprelu"):
        raise ValueError(f"{folder}/{CONFIG}: architecture is {architecture!r}; read are standard, topk, jumprelu")
    expected = _TENSORS | ({"threshold"} if architecture == "jumprelu" else set())
    if set(tensors) != expected:
        raise ValueError(f"{folder}/{WEIGHTS}: expected the tensors {sorted(expected)}, found {sorted(tensors)}")
    d_in, width = config.get("d_in"), config.get("d_sae")
    shapes = {
        "W_enc": (d_in, width),
        "W_dec": (width, d_in),
        "b_enc": (width,),
        "b_dec": (d_in,),
        "threshold": (width,),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{folder}/{WEIGHTS}: {name} is {list(tensor.shape)}, {CONFIG} says {list(shapes[name])}")
    if config.get("normalize_activations", "none") != "none":
        raise ValueError(f"{folder}: normalize_activations {config['normalize_activations']!r}; only 'none' is read")
    return SAE(
        tensors["W_enc"].float().T.contiguous(),
        tensors["b_enc"].float(),
        tensors["W_dec"].float(),
        tensors["b_dec"].float(),
        architecture=architecture,
        threshold=tensors["threshold"].float() if "threshold" in tensors else None,
        k=config.get("k"),
        subtract_b_dec=config.get("apply_b_dec_to_input", True),
        config=config,
    )


def _replace(partial: Path, folder: Path) -> None:
    """Put a finished folder in place; an older one under the name goes only when the new one stands."""
    for file in partial.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    old = None
    if folder.exists():
        old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
        folder.rename(old)
    partial.rename(folder)
    if old is not None:
        shutil.rmtree(old)
