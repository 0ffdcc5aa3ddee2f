"""Methods: a row each, naming how it encodes and what it minimises. A new method is a function and a row here.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.codes import Acts, Codes, encode_at
from c2r.loss.terms import Forward, aux_k, reconstruction

if TYPE_CHECKING:
    from c2r.train.run import Run


class Recipe(NamedTuple):
    """One method."""

    encode: Callable[[Run, Tensor], Acts]
    """Activations of a batch `[B, D]`."""
    terms: dict[str, Callable[[Run, Forward], Tensor]]
    """What is minimised besides C²R, each term with its weight; they are summed."""


def encode_batch_top_k(run: Run, x_BD: Tensor) -> Acts:
    """The product in the configured precision decides which latents fire; their values are computed in fp32."""
    sae = run.sae
    with torch.no_grad():
        centred_BD = (x_BD - sae.b_dec).to(run.product_dtype)
        pre_BF = F.linear(centred_BD, sae.W_enc.to(run.product_dtype), sae.b_enc.to(run.product_dtype))
        support = run.selector.select(pre_BF, run.k)
        del pre_BF
    return Codes(F.relu(encode_at(support, x_BD, sae.W_enc, sae.b_enc, sae.b_dec)), support)


def _reconstruction(run: Run, forward: Forward) -> Tensor:
    return reconstruction(forward)


def _aux_k(run: Run, forward: Forward) -> Tensor:
    return run.config.aux_coefficient * aux_k(forward, run.config.aux_k or max(1, run.sae.d_in // 2))


RECIPES: dict[str, Recipe] = {
    "batch_top_k": Recipe(encode_batch_top_k, {"reconstruction": _reconstruction, "aux_k": _aux_k}),
}
