"""Methods: a row each, naming how it encodes and what it minimises. A new method is a function and a row here,
and a section in `methods.py`.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from c2r import losses as terms
from c2r.kernels.codes import Codes
from c2r.losses import Encoded, Forward
from c2r.sae.jumprelu import jump_relu, published_soft_l0, soft_l0
from c2r.sae.model import Architecture
from c2r.sae.selection import support_above, top_k_of_each_token

if TYPE_CHECKING:
    from c2r.training.run import Run

Term = Callable[["Run[Any]", Forward], Tensor]


class Recipe(NamedTuple):
    """One method."""

    encode: Callable[[Run[Any], Tensor], Encoded]
    """Activations of a batch `[B, D]`."""
    terms: dict[str, Term]
    """What is minimised besides C²R, each term with its weight; they are summed."""
    architecture: Architecture
    """Of the saved SAE."""
    trained_as: Architecture = "standard"
    """Which weights are trained."""
    unit_rows: bool = True
    """Decoder rows are held at norm 1: the gradient's part along them is taken out, and they are renormalised."""
    initial_norm: float = 1.0
    """Of the decoder's and encoder's rows."""
    median_start: bool = True
    """b_dec starts at the geometric median of the first batch."""
    subtract_b_dec: bool = True
    """Whether x − b_dec or x enters the encoder."""


def encode_relu(run: Run[Any], x_BD: Tensor) -> Encoded:
    """f = ReLU(pre)."""
    if not run.sparse_pays:
        return Encoded(F.relu(run.product(x_BD)))
    support = support_above(run.selecting_product(x_BD), -run.sae.b_enc)
    return Encoded(Codes(F.relu(run.encode_at(x_BD, support)), support))


def encode_jump_relu(run: Run[Any], x_BD: Tensor) -> Encoded:
    """f = pre where pre > threshold."""
    threshold_F: Any = run.sae.threshold
    if not run.sparse_pays:
        pre_BF = run.product(x_BD)
        return Encoded(jump_relu(pre_BF, threshold_F, run.config.bandwidth), pre=pre_BF)
    # The entries that fire, and those so little below their threshold that they count in its gradient.
    support = support_above(run.selecting_product(x_BD), threshold_F - run.config.bandwidth / 2 - run.sae.b_enc)
    pre_N = run.encode_at(x_BD, support)
    acts_N = jump_relu(pre_N, threshold_F[support.latents_N], run.config.bandwidth)
    return Encoded(Codes(acts_N, support), pre=Codes(pre_N, support))


def encode_gated(run: Run[Any], x_BD: Tensor) -> Encoded:
    """f = magnitude where the gate is open; C²R sees the gate's activations, which alone decide what fires."""
    sae: Any = run.sae
    if not run.sparse_pays:
        pre_BF = run.product(x_BD)
        return Encoded(sae.activate(pre_BF), gate=F.relu(pre_BF))
    support = support_above(run.selecting_product(x_BD), -run.sae.b_enc)
    pre_N, at = run.encode_at(x_BD, support), support.latents_N
    magnitude_N = sae.r_mag[at].exp() * (pre_N - sae.b_enc[at]) + sae.b_mag[at]
    open_N = F.relu(magnitude_N) * (pre_N > 0)
    return Encoded(Codes(open_N, support), gate=Codes(F.relu(pre_N), support))


def encode_top_k(run: Run[Any], x_BD: Tensor) -> Encoded:
    """The k largest positive of each token."""
    support = top_k_of_each_token(run.product_by_token(x_BD), run.k)
    return Encoded(Codes(F.relu(run.encode_at(x_BD, support)), support))


def encode_abs_top_k(run: Run[Any], x_BD: Tensor) -> Encoded:
    """The k of each token that are largest in absolute value, with their sign."""
    support = top_k_of_each_token(run.product_by_token(x_BD), run.k, signed=True)
    return Encoded(Codes(run.encode_at(x_BD, support), support))


def encode_batch_top_k(run: Run[Any], x_BD: Tensor) -> Encoded:
    """The B·k largest positive of the batch."""
    sae, selector, values_N = run.sae, run.selector, None
    if run.coarse and (found := selector.select_coarsely(sae.centred(x_BD).detach(), sae.W_enc, sae.b_enc, run.k)):
        support, values_N = found
        run.int8_found = True
    else:
        run.int8_found = False
        support = selector.select(run.selecting_product(x_BD), sae.b_enc, run.k)
    return Encoded(Codes(F.relu(run.encode_at(x_BD, support, values_N)), support))


def reconstruction(run: Run[Any], forward: Forward) -> Tensor:
    """Mean over tokens of ‖x − x̂‖²."""
    return terms.reconstruction(forward)


def _prefixes(run: Run[Any], forward: Forward) -> Tensor:
    groups = len(run.config.fractions)
    return terms.reconstruction(forward, run.config.weights or (1 / groups,) * groups)


def _aux_k(run: Run[Any], forward: Forward) -> Tensor:
    k, signed = run.config.aux_k or max(1, run.sae.d_in // 2), run.recipe.architecture == "abs_topk"
    return run.config.aux_coefficient * terms.aux_k(forward, k, signed=signed)


def _orthogonality(run: Run[Any], forward: Forward) -> Tensor:
    return run.config.orthogonality * terms.orthogonality(run.sae.W_dec, *run.neighbors())


def _l1(run: Run[Any], forward: Forward) -> Tensor:
    return run.config.l1 * run.sparsity_scale * terms.l1(forward.encoded.penalised)


def _l1_of_norms(run: Run[Any], forward: Forward) -> Tensor:
    return run.config.l1 * run.sparsity_scale * terms.l1(forward.encoded.acts, run.sae.W_dec.norm(dim=1))


def _lp(run: Run[Any], forward: Forward) -> Tensor:
    p, rescaled = run.annealed_p(forward.encoded.acts)
    return run.config.l1 * run.sparsity_scale * rescaled * terms.lp(forward.encoded.acts, p)


def _target_l0(run: Run[Any], forward: Forward) -> Tensor:
    threshold_F: Any = run.sae.threshold
    encoded, bandwidth = forward.encoded, run.config.bandwidth
    if run.config.l0_gradient == "paper":
        assert encoded.pre is not None
        l0 = soft_l0(encoded.pre, threshold_F, bandwidth)
    else:
        l0 = published_soft_l0(encoded.acts, threshold_F, bandwidth)
    off_target = l0 / run.config.target_l0 - 1
    return run.config.sparsity_coefficient * run.sparsity_scale * off_target.square()


def _gate_reconstruction(run: Run[Any], forward: Forward) -> Tensor:
    return terms.gate_reconstruction(forward)


_TOP_K: dict[str, Term] = {"reconstruction": reconstruction, "aux_k": _aux_k}
RECIPES: dict[str, Recipe] = {
    "standard": Recipe(
        encode_relu, {"reconstruction": reconstruction, "l1": _l1}, "standard", initial_norm=0.1, median_start=False
    ),
    "april_update": Recipe(
        encode_relu, {"reconstruction": reconstruction, "l1": _l1_of_norms}, "standard",
        unit_rows=False, initial_norm=0.1, median_start=False,
    ),
    "p_anneal": Recipe(
        encode_relu, {"reconstruction": reconstruction, "lp": _lp}, "standard", initial_norm=0.1, median_start=False
    ),
    "top_k": Recipe(encode_top_k, _TOP_K, "topk"),
    "abs_top_k": Recipe(encode_abs_top_k, _TOP_K, "abs_topk"),
    "batch_top_k": Recipe(encode_batch_top_k, _TOP_K, "jumprelu"),
    "matryoshka_batch_top_k": Recipe(encode_batch_top_k, {"reconstruction": _prefixes, "aux_k": _aux_k}, "jumprelu"),
    "ort": Recipe(encode_batch_top_k, _TOP_K | {"orthogonality": _orthogonality}, "jumprelu"),
    "jump_relu": Recipe(
        encode_jump_relu, {"reconstruction": reconstruction, "l0": _target_l0}, "jumprelu", "jumprelu",
        median_start=False, subtract_b_dec=False,
    ),
    "gated": Recipe(
        encode_gated,
        {"reconstruction": reconstruction, "l1": _l1, "gate_reconstruction": _gate_reconstruction},
        "gated", "gated", median_start=False,
    ),
}  # fmt: skip
