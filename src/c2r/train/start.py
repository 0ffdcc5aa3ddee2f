"""Starting from an SAE that exists: any folder whose architecture the method can take up. F latents."""

from __future__ import annotations

import torch

from c2r.interop.saelens import load_sae
from c2r.methods import SAEConfig
from c2r.recipes import RECIPES
from c2r.sae.base import SAE, Extra
from c2r.train.run import rescaled


def check_start(config: SAEConfig) -> SAE | None:
    """The SAE that `config.init` names, or None where it names none.

    Raises:
        ValueError: no SAE folder, another width, or an architecture that the method cannot start from.
    """
    if config.init is None:
        return None
    where = f"saes.{config.name}.init"
    try:
        sae = load_sae(config.init)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if sae.width != config.width:
        raise ValueError(f"{where}: {config.init} has {sae.width} latents; width is {config.width}")
    gated = RECIPES[config.method].trained_as == "gated"
    if gated != (sae.architecture == "gated"):
        raise ValueError(
            f"{where}: {config.init} is {sae.architecture!r}, which method {config.method!r} cannot start from; "
            "gated starts from gated alone, and the others from any other"
        )
    return sae


@torch.no_grad()
def starting_weights(sae: SAE, config: SAEConfig, scale: float) -> SAE:
    """Weights for training on activations `scale` times those that `sae` reads, in the form that the method trains.

    A decoder bias that the one subtracts and the other does not is moved into the encoder's. A threshold or k is
    dropped where the method learns its own.
    """
    recipe = RECIPES[config.method]
    b_enc_F = sae.b_enc + sae.W_enc @ sae.b_dec * (int(recipe.subtract_b_dec) - int(sae.subtract_b_dec))
    extra = Extra()
    if recipe.trained_as == "jumprelu":
        extra = Extra(threshold=torch.zeros_like(b_enc_F) if sae.threshold is None else sae.threshold)
    elif recipe.trained_as == "gated":
        extra = Extra(r_mag=sae.r_mag, b_mag=sae.b_mag)
    plain = SAE(
        sae.W_enc, b_enc_F, sae.W_dec, sae.b_dec, architecture=recipe.trained_as, extra=extra,
        subtract_b_dec=recipe.subtract_b_dec,
    )  # fmt: skip
    return rescaled(plain, scale, recipe.trained_as, extra)
