"""Warm start: training from an existing SAE whose architecture the method supports.

F latents.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.markup import escape

from c2r.config.run import RunConfig
from c2r.config.saes import SAEConfig
from c2r.interop.saelens import load_sae
from c2r.methods import METHODS
from c2r.sae.model import SAE, Extra, rescaled, row_norms

_SPREAD = 1.01
"""If the largest and smallest decoder norms differ by at most this factor, they count as equal."""


def check_start(config: SAEConfig, run: RunConfig | None = None, console: Console | None = None) -> SAE | None:
    """Load the SAE that `config.init` names; None if it is unset.

    Arguments:
        run: the run; if given, warn if the SAE was trained on another model or hook point.
        console: where to print warnings and changes made to the weights; None prints nothing.

    Raises:
        ValueError: not an SAE folder, a different width, or an architecture that the method cannot start from.
    """
    if config.init is None:
        return None
    where, row = f"saes.{config.name}.init", METHODS[config.method]
    try:
        sae = load_sae(config.init)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if sae.width != config.width:
        raise ValueError(f"{where}: {config.init} has {sae.width} latents, but width is {config.width}")
    gated = row.trained_as == "gated"
    if gated != (sae.architecture == "gated"):
        raise ValueError(
            f"{where}: {config.init} is {sae.architecture!r}, which method {config.method!r} cannot start from; "
            "'gated' starts only from a gated SAE, the other methods from any SAE that is not gated"
        )
    norm_F = row_norms(sae.W_dec)
    short, long = (f(norm_F[norm_F > 0]).item() if bool((norm_F > 0).any()) else 1.0 for f in (torch.min, torch.max))
    if sae.architecture == row.architecture and sae.k is not None and long > _SPREAD * short:
        raise ValueError(
            f"{where}: {config.init} selects its k latents by pre-activation, with decoder rows of norm {short:.3g} "
            f"to {long:.3g}. Method {config.method!r} keeps the rows at norm 1, which would change the selection; "
            "accepted are SAEs whose decoder rows all have the same norm"
        )
    if console is not None:
        for line in [*_changes(sae, config), *([] if run is None else _elsewhere(sae, config, run))]:
            console.print(f"[yellow]{escape(f'{where}: {line}')}[/]", soft_wrap=True, highlight=False)
    return sae


def _changes(sae: SAE, config: SAEConfig) -> list[str]:
    """Changes made to the SAE before the first step, one message each."""
    if not METHODS[config.method].unit_rows:
        return []
    norm_F = row_norms(sae.W_dec)
    empty = (norm_F < 1e-30).nonzero().flatten().tolist()
    found = []
    if bool(((norm_F - 1).abs()[norm_F >= 1e-30] > 0.01).any()):
        found.append(
            "decoder rows are scaled to unit norm and the encoder accordingly; the SAE's outputs do not change"
        )
    if empty:
        some = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        found.append(f"{len(empty)} latents have a zero decoder row and get a random direction ({some})")
    return found


def _elsewhere(sae: SAE, config: SAEConfig, run: RunConfig) -> list[str]:
    """Differences between what the SAE was trained on, by its file, and this run."""
    ours = (sae.config.get("c2r") or {}).get("model") or {}
    metadata = sae.config.get("metadata") or {}
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    said = {
        "model": ours.get("name") or metadata.get("model_name"),
        "hook point": metadata.get("hook_name"),
        "center_writing_weights": kwargs.get("center_writing_weights") or ours.get("center_writing_weights"),
    }
    now = {
        "model": run.model.name,
        "hook point": run.point(config).name,
        "center_writing_weights": run.model.center_writing_weights,
    }
    return [
        f"it was trained with {key} {had}; this run continues with {now[key]}"
        for key, had in said.items()
        if had is not None and had != now[key]
    ]


@torch.no_grad()
def starting_weights(sae: SAE, config: SAEConfig, scale: float) -> SAE:
    """The weights of `sae` in the form the method trains, for activations multiplied by `scale`.

    If only one of the two subtracts the decoder bias from its input, the difference is moved into the encoder bias. A
    threshold or k is dropped if the method learns its own.
    """
    row = METHODS[config.method]
    b_enc_F = sae.b_enc + sae.W_enc @ sae.b_dec * (int(row.subtract_b_dec) - int(sae.subtract_b_dec))
    extra = Extra()
    if row.trained_as == "jumprelu":
        extra = Extra(threshold=torch.zeros_like(b_enc_F) if sae.threshold is None else sae.threshold)
    elif row.trained_as == "gated":
        extra = Extra(r_mag=sae.r_mag, b_mag=sae.b_mag)
    plain = SAE(
        sae.W_enc, b_enc_F, sae.W_dec, sae.b_dec, architecture=row.trained_as, extra=extra,
        subtract_b_dec=row.subtract_b_dec,
    )  # fmt: skip
    return rescaled(plain, scale, row.trained_as, extra)
