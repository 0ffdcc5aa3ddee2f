"""Reads and writes SAE folders in SAELens's format: `cfg.json` and `sae_weights.safetensors`.

The file's layout is `W_enc [D, F]` and `W_dec [F, D]`; c2r stores `W_enc` as `[F, D]` and transposes it only here. Its
own settings are saved in `cfg.json` under `c2r`, which SAELens ignores.

D width of the activations · F latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from c2r.interop.folders import check_folder, family_of_config, read_json, refuse_pickle
from c2r.interop.sae_config import Described, checked, described
from c2r.layout import SAE_CONFIG, SAE_WEIGHTS
from c2r.sae.model import SAE, Extra, count_not_finite, row_norms
from c2r.storage import whole

SAELENS_VERSION = "6.54.12"
"""The SAELens version of this format. SAELens discards metadata that does not contain a version."""
_COMMON = {"W_enc", "W_dec", "b_dec"}
_TENSORS: dict[str, set[str]] = {
    "standard": _COMMON | {"b_enc"},
    "topk": _COMMON | {"b_enc"},
    "jumprelu": _COMMON | {"b_enc", "threshold"},
    "gated": _COMMON | {"b_gate", "r_mag", "b_mag"},
    "abs_topk": _COMMON | {"b_enc"},
}
"""Tensors of each architecture. SAELens's name for abs_topk is abstopk."""
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""Names of a factor per latent, applied before decoding, that SAELens trained before version 6."""
_MAY_MATTER = ("w_", "b_", "threshold", "scal", "norm", "gate", "mag", "bias", "weight", "skip", "mask", "factor")
"""An unknown tensor whose name contains one of these may change what the SAE computes."""


def save_sae(sae: SAE, folder: Path, *, metadata: dict[str, Any], c2r: dict[str, Any]) -> None:
    """Write an SAE folder atomically. The saved SAE is equivalent to `sae`.

    Decoder rows are scaled to unit norm if the format can express that. "topk" and "abs_topk" select latents by
    pre-activation, so they keep norms on which the selection depends.

    Arguments:
        metadata: SAELens's metadata about the SAE's origin (`model_name`, `hook_name`, `context_size`, …).
        c2r: c2r's own settings and values found in training.
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
    with whole(folder, others=lambda name: name not in (SAE_CONFIG, SAE_WEIGHTS)) as partial:
        partial.mkdir(parents=True)
        save_file({k: v.detach().cpu().float().contiguous() for k, v in tensors.items()}, partial / SAE_WEIGHTS)
        (partial / SAE_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_sae(path: str | Path) -> SAE:
    """Read an SAE folder written by c2r or SAELens (architectures standard, topk, jumprelu, gated, abs_topk).

    Folders of SAELens before version 6 are supported too. Weights of any floating-point type are converted to fp32.
    Settings that can be expressed in the weights are folded into them; other settings that would change what the SAE
    computes are refused.

    Raises:
        ValueError: no such folder, a corrupt file, another format, a pickle instead of the weights (it is not opened),
            NaN or infinity in the weights, or an unsupported setting; names the file, the key or tensor and the value.
    """
    folder = Path(path).expanduser()
    if (folder / SAE_WEIGHTS).is_file():
        refuse_pickle(folder / SAE_WEIGHTS)
    check_folder(folder)
    raw = read_json(folder / SAE_CONFIG)
    if family := family_of_config(raw):
        raise ValueError(f"{folder}/{SAE_CONFIG}: recognised as written by {family}, which c2r cannot read yet")
    try:
        config = checked(raw)
        says = described(config)
    except ValueError as error:
        raise ValueError(f"{folder}/{SAE_CONFIG}: {error}") from error
    try:
        tensors = load_file(folder / SAE_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder}: corrupt SAE folder: {SAE_WEIGHTS}: {error}") from error
    try:
        weights = _weights(tensors, says)
    except ValueError as error:
        raise ValueError(f"{folder}/{SAE_WEIGHTS}: {error}") from error
    config |= {"architecture": says.architecture} | ({"k": says.k} if says.k is not None else {})
    return _assembled(weights, says, config).requires_grad_(False)


def _weights(tensors: dict[str, Tensor], says: Described) -> dict[str, Tensor]:
    """The architecture's tensors in fp32, with `threshold` expanded to `[F]`, and `factor [F]` if there is one.

    Raises:
        ValueError: a tensor is missing, has the wrong shape or type, contains NaN or infinity, or is unknown and may
            change what the SAE computes.
    """
    wanted = _TENSORS[says.architecture]
    if says.architecture == "jumprelu" and "log_threshold" in tensors and "threshold" not in tensors:
        # training checkpoints of SAELens 4 and 5
        tensors = {**tensors, "threshold": tensors["log_threshold"].float().exp()}
        del tensors["log_threshold"]
    if not wanted <= set(tensors):
        raise ValueError(f"expected the tensors {sorted(wanted)}, found {sorted(tensors)}")
    for name, tensor in tensors.items():
        known = name in wanted or name in _FACTORS
        if known and not tensor.is_floating_point():
            raise ValueError(f"{name}: got type {tensor.dtype}; accepted are floating-point numbers")
        if not known and (reason := _may_matter(name, tensor, says.d_sae)):
            raise ValueError(
                f"expected the tensors {sorted(wanted)}, found {name} {list(tensor.shape)} too. It may change what the "
                f"SAE computes ({reason}), but architecture {says.architecture!r} has no such tensor"
            )
    if "threshold" in wanted and tensors["threshold"].numel() == 1:
        tensors = {**tensors, "threshold": tensors["threshold"].reshape(1).expand(len(tensors["W_dec"]))}
    d_in, width = says.d_in, says.d_sae
    shapes = {"W_enc": (d_in, width), "W_dec": (width, d_in), "b_dec": (d_in,)}
    for name in sorted(wanted):
        tensor, shape = tensors[name], shapes.get(name, (width,))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}; expected {list(shape)} (cfg.json: d_in {d_in}, d_sae {width})"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: {count_not_finite(tensor)}; did the training of this SAE diverge?")
    weights = {name: tensors[name].float().contiguous() for name in wanted}
    for name in _FACTORS:
        if name in tensors:
            weights |= _factor(name, tensors[name].float(), says)
    return weights


def _factor(name: str, factor: Tensor, says: Described) -> dict[str, Tensor]:
    """The factor applied to activations before decoding, as `{"factor": …}`; empty if it is 1."""
    if bool(torch.isclose(factor, torch.ones(())).all()):
        return {}
    if not says.finetuned:
        raise ValueError(f"{name} is not 1 everywhere, but finetuning_scaling_factor in cfg.json is not true")
    if tuple(factor.shape) != (says.d_sae,) or not bool(factor.isfinite().all()):
        raise ValueError(f"{name}: got shape {list(factor.shape)}; accepted are {says.d_sae} finite numbers")
    return {"factor": factor}


def _may_matter(name: str, tensor: Tensor, width: int | None) -> str | None:
    """Why an unknown tensor may change what the SAE computes; None if it cannot."""
    lower = name.lower()
    if any(lower.startswith(part) if part.endswith("_") else part in lower for part in _MAY_MATTER):
        return "its name looks like a weight's"
    if tensor.numel() not in (0, 1, width):
        return "it contains more than one number per latent"
    return None


def _assembled(weights: dict[str, Tensor], says: Described, config: dict[str, Any]) -> SAE:
    """The SAE, with the file's settings folded into its weights."""
    W_enc, W_dec, b_dec = weights["W_enc"].T, weights["W_dec"], weights["b_dec"]
    b_enc = weights["b_gate" if says.architecture == "gated" else "b_enc"]
    if says.rescaled:
        norms = row_norms(W_dec)
        if says.architecture not in ("topk", "abs_topk") and not torch.allclose(
            norms, torch.ones_like(norms), atol=1e-4
        ):
            raise ValueError(
                f"cfg.json: rescale_acts_by_decoder_norm: got true with architecture {says.architecture!r} and decoder "
                "rows without unit norm; accepted are unit norm, or architectures topk and abs_topk"
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
