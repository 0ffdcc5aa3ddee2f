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
from torch import Tensor

from c2r.interop.folders import CONFIG, WEIGHTS, check_folder, family_of_config, read_json, refuse_pickle
from c2r.interop.sae_config import Described, checked, described
from c2r.sae.model import SAE, Extra, count_not_finite, row_norms

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
"""By architecture. SAELens knows all but abs_topk, which it calls abstopk."""
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""Names of the factor per latent between activations and decoder that SAELens trained before version 6."""
_MAY_MATTER = ("w_", "b_", "threshold", "scal", "norm", "gate", "mag", "bias", "weight", "skip", "mask", "factor")
"""A tensor of another name that contains one of these may change what the SAE computes."""


def save_sae(sae: SAE, folder: Path, *, metadata: dict[str, Any], c2r: dict[str, Any]) -> None:
    """Write the SAE folder, whole or not at all. It computes what `sae` does.

    Decoder rows are brought to unit norm where the format can express that: "topk" and "abs_topk" choose by
    pre-activations, and keep norms that the choice depends on.

    Arguments:
        metadata: what SAELens keeps of an SAE's origin (`model_name`, `hook_name`, `context_size`, …).
        c2r: our own settings and the numbers found in training.
    """
    sae = sae.with_unit_rows().with_plain_ranking()
    tensors = {"W_dec": sae.W_dec, "b_dec": sae.b_dec, "W_enc": sae.W_enc.T}
    if sae.r_mag is not None and sae.b_mag is not None:
        tensors |= {"b_gate": sae.b_enc, "r_mag": sae.r_mag, "b_mag": sae.b_mag}
    else:
        tensors |= {"b_enc": sae.b_enc}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
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

    Folders of SAELens before version 6 are read too. Weights of any floating-point type become fp32. What a file asks
    for and plain weights can express is folded into them; anything else that would change what the SAE computes is
    refused.

    Raises:
        ValueError: no such folder, a damaged or foreign file, a pickle instead of the weights (it is not opened),
            weights that are not finite, or something that is not read; names the file, the key or tensor and the value.
    """
    folder = Path(path).expanduser()
    if (folder / WEIGHTS).is_file():
        refuse_pickle(folder / WEIGHTS)
    check_folder(folder)
    raw = read_json(folder / CONFIG)
    if family := family_of_config(raw):
        raise ValueError(f"{folder}/{CONFIG}: recognised as one of {family}; reading these is not supported yet")
    try:
        config = checked(raw)
        says = described(config)
    except ValueError as error:
        raise ValueError(f"{folder}/{CONFIG}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged SAE folder: {WEIGHTS}: {error}") from error
    try:
        weights = _weights(tensors, says)
    except ValueError as error:
        raise ValueError(f"{folder}/{WEIGHTS}: {error}") from error
    config |= {"architecture": says.architecture} | ({"k": says.k} if says.k is not None else {})
    return _assembled(weights, says, config).requires_grad_(False)


def _weights(tensors: dict[str, Tensor], says: Described) -> dict[str, Tensor]:
    """The tensors of the architecture in fp32, `threshold` as `[F]`, and `factor [F]` if there is one.

    Raises:
        ValueError: tensors that are missing, of another shape, not numbers, not finite, or may change the function.
    """
    wanted = _TENSORS[says.architecture]
    if says.architecture == "jumprelu" and "log_threshold" in tensors and "threshold" not in tensors:
        tensors = {**tensors, "threshold": tensors["log_threshold"].float().exp()}  # SAELens 4 and 5 in training
        del tensors["log_threshold"]
    if not wanted <= set(tensors):
        raise ValueError(f"expected the tensors {sorted(wanted)}, found {sorted(tensors)}")
    for name, tensor in tensors.items():
        known = name in wanted or name in _FACTORS
        if known and not tensor.is_floating_point():
            raise ValueError(f"{name} is of type {tensor.dtype}; read are floating-point numbers")
        if not known and (reason := _may_matter(name, tensor, says.d_sae)):
            raise ValueError(
                f"expected the tensors {sorted(wanted)}, found {name} {list(tensor.shape)} too. It may change what the "
                f"SAE computes ({reason}), and architecture {says.architecture!r} has no such tensor"
            )
    if "threshold" in wanted and tensors["threshold"].numel() == 1:
        tensors = {**tensors, "threshold": tensors["threshold"].reshape(1).expand(len(tensors["W_dec"]))}
    d_in, width = says.d_in, says.d_sae
    shapes = {"W_enc": (d_in, width), "W_dec": (width, d_in), "b_dec": (d_in,)}
    for name in sorted(wanted):
        tensor, shape = tensors[name], shapes.get(name, (width,))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, cfg.json says {list(shape)} (d_in {d_in}, d_sae {width})"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: {count_not_finite(tensor)}; did the training of this SAE diverge?")
    weights = {name: tensors[name].float().contiguous() for name in wanted}
    for name in _FACTORS:
        if name in tensors:
            weights |= _factor(name, tensors[name].float(), says)
    return weights


def _factor(name: str, factor: Tensor, says: Described) -> dict[str, Tensor]:
    """The factor between activations and decoder; nothing where it is 1."""
    if bool(torch.isclose(factor, torch.ones(())).all()):
        return {}
    if not says.finetuned:
        raise ValueError(f"{name} is not 1 everywhere, but finetuning_scaling_factor in cfg.json does not ask for it")
    if tuple(factor.shape) != (says.d_sae,) or not bool(factor.isfinite().all()):
        raise ValueError(f"{name} {list(factor.shape)}: accepted are {says.d_sae} finite numbers")
    return {"factor": factor}


def _may_matter(name: str, tensor: Tensor, width: int | None) -> str | None:
    """Why a tensor that the architecture does not have could be more than bookkeeping, None where it could not."""
    lower = name.lower()
    if any(lower.startswith(part) if part.endswith("_") else part in lower for part in _MAY_MATTER):
        return "its name is one of a weight"
    if tensor.numel() not in (0, 1, width):
        return "it holds more than one number per latent"
    return None


def _assembled(weights: dict[str, Tensor], says: Described, config: dict[str, Any]) -> SAE:
    """The SAE, with what the file asks for besides folded into its weights."""
    W_enc, W_dec, b_dec = weights["W_enc"].T, weights["W_dec"], weights["b_dec"]
    b_enc = weights["b_gate" if says.architecture == "gated" else "b_enc"]
    if says.rescaled:
        norms = row_norms(W_dec)
        if says.architecture not in ("topk", "abs_topk") and not torch.allclose(
            norms, torch.ones_like(norms), atol=1e-4
        ):
            raise ValueError(
                f"cfg.json: rescale_acts_by_decoder_norm is true in architecture {says.architecture!r} with decoder "
                "rows that are not of unit norm; read is that with topk and abs_topk"
            )
        norm_F = norms.float()
        W_enc, b_enc = W_enc * norm_F[:, None], b_enc * norm_F
        W_dec = W_dec / torch.where(norm_F > 0, norm_F, 1.0)[:, None]
    if "factor" in weights:
        W_dec = W_dec * weights["factor"][:, None]
    W_enc, W_dec, b_dec = W_enc * says.input_scale, W_dec / says.input_scale, b_dec / says.input_scale
    return SAE(
        W_enc.contiguous(),
        b_enc,
        W_dec,
        b_dec,
        architecture=says.architecture,
        extra=Extra(weights.get("threshold"), weights.get("r_mag"), weights.get("b_mag"), says.k),
        subtract_b_dec=says.subtract_b_dec,
        config=config,
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
