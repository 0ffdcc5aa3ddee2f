"""All training methods: how they compute activations, their loss terms besides C²R, and the SAE they save.

`docs/explanation/methods.md` lists the papers.

B tokens in a batch · F latents · N selected (token, latent) entries in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r import losses, schedules
from c2r.config.saes import (
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    OrtConfig,
    PAnnealConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
    group_ends,
)
from c2r.kernels.codes import Codes
from c2r.losses import Encoded, Forward
from c2r.sae.jumprelu import jump_relu, published_soft_l0, soft_l0
from c2r.sae.model import Extra
from c2r.sae.selection import BatchTopK, support_above, top_k_of_each_token
from c2r.step import Method, Step

# Encoders


def encode_relu(step: Step[SAEConfig]) -> Encoded:
    """f = ReLU(pre)."""
    if not step.sparse_pays:
        return Encoded(F.relu(step.encoder.dense(step.x_BD)))
    support = support_above(step.encoder.scores(step.x_BD), -step.sae.b_enc)
    return Encoded(Codes(F.relu(step.encoder.at(step.x_BD, support)), support))


def encode_jump_relu(step: Step[JumpReLUConfig]) -> Encoded:
    """f = pre where pre > threshold."""
    threshold_F: Any = step.sae.threshold
    bandwidth = step.config.bandwidth
    if not step.sparse_pays:
        pre_BF = step.encoder.dense(step.x_BD)
        return Encoded(jump_relu(pre_BF, threshold_F, bandwidth), pre=pre_BF)
    # Include entries slightly below the threshold: they contribute to its gradient.
    support = support_above(step.encoder.scores(step.x_BD), threshold_F - bandwidth / 2 - step.sae.b_enc)
    pre_N = step.encoder.at(step.x_BD, support)
    acts_N = jump_relu(pre_N, threshold_F[support.latents_N], bandwidth)
    return Encoded(Codes(acts_N, support), pre=Codes(pre_N, support))


def encode_gated(step: Step[GatedConfig]) -> Encoded:
    """f = magnitude where the gate is open. C²R uses the gate's activations, since the gate decides what fires."""
    sae: Any = step.sae
    if not step.sparse_pays:
        pre_BF = step.encoder.dense(step.x_BD)
        return Encoded(sae.activate(pre_BF), gate=F.relu(pre_BF))
    support = support_above(step.encoder.scores(step.x_BD), -sae.b_enc)
    pre_N, at = step.encoder.at(step.x_BD, support), support.latents_N
    magnitude_N = sae.r_mag[at].exp() * (pre_N - sae.b_enc[at]) + sae.b_mag[at]
    open_N = F.relu(magnitude_N) * (pre_N > 0)
    return Encoded(Codes(open_N, support), gate=Codes(F.relu(pre_N), support))


def encode_top_k(step: Step[TopKConfig]) -> Encoded:
    """The k largest positive pre-activations of each token."""
    support = top_k_of_each_token(step.encoder.scores_by_token(step.x_BD), _k(step))
    return Encoded(Codes(F.relu(step.encoder.at(step.x_BD, support)), support))


def encode_abs_top_k(step: Step[TopKConfig]) -> Encoded:
    """The k pre-activations of each token that are largest in absolute value, with their sign."""
    support = top_k_of_each_token(step.encoder.scores_by_token(step.x_BD), _k(step), signed=True)
    return Encoded(Codes(step.encoder.at(step.x_BD, support), support))


def encode_batch_top_k(step: Step[TopKConfig]) -> Encoded:
    """The B·k largest positive pre-activations of the batch."""
    sae, encoder, selection = step.sae, step.encoder, step.memory
    found = None
    if encoder.int8:
        found = selection.select_coarsely(sae.centred(step.x_BD).detach(), sae.W_enc, sae.b_enc, _k(step))
    support, values_N = found or (selection.select(encoder.scores(step.x_BD), sae.b_enc, _k(step)), None)
    codes = Codes(F.relu(encoder.at(step.x_BD, support, values_N)), support)
    return Encoded(codes, found_by_int8=found is not None)


def encode_matryoshka(step: Step[MatryoshkaConfig]) -> Encoded:
    """Like `encode_batch_top_k`, with the ends of the prefixes that must reconstruct."""
    return encode_batch_top_k(step)._replace(ends=group_ends(step.config.fractions, step.config.width))


def _k(step: Step[TopKConfig]) -> int:
    return schedules.k_of_step(step.config, step.number, step.steps, step.sae.d_in)


# The inference threshold of the top-k family


@dataclass
class KeptPerToken:
    """State of `top_k` and `abs_top_k`: the smallest selected activation of each token, averaged over tokens."""

    threshold: Tensor = field(default_factory=lambda: torch.tensor(-1.0))
    """Moving average over batches; −1 until it begins."""
    smallest: Tensor = field(default_factory=lambda: torch.tensor(-1.0))
    """Value of the last batch, used if the SAE is saved before the moving average begins."""


@dataclass
class KeptPerBatch(BatchTopK):
    """State of the batch-top-k methods: that of the selection, and the batch's smallest selected activation."""

    threshold: Tensor = field(default_factory=lambda: torch.tensor(-1.0))
    smallest: Tensor = field(default_factory=lambda: torch.tensor(-1.0))


def follow_threshold(step: Step[TopKConfig], encoded: Encoded) -> None:
    """Average the smallest positive selected activation (Bussmann et al. 2024, arXiv 2412.06410, section 3)."""
    memory, acts = step.memory, encoded.acts
    assert isinstance(acts, Codes)
    memory.smallest = _smallest(acts, per_token=isinstance(memory, KeptPerToken))
    if step.number > schedules.threshold_start(step.config, step.steps):
        moved = memory.threshold.lerp(memory.smallest, 1 - schedules.threshold_decay(step.config, step.steps))
        memory.threshold = torch.where(memory.threshold < 0, memory.smallest, moved)


def _smallest(acts: Codes, *, per_token: bool) -> Tensor:
    """The smallest positive activation of the batch, or the mean of each token's smallest; 0 if none is positive."""
    values_N = acts.values_N.detach()
    kept_N = values_N > 0
    if not kept_N.any():
        return values_N.new_zeros(())
    if not per_token:
        return values_N[kept_N].min()
    least_B = values_N.new_full((acts.support.batch,), torch.inf)
    least_B.scatter_reduce_(0, acts.support.tokens_N[kept_N], values_N[kept_N], "amin")
    return least_B[least_B.isfinite()].mean()


def with_threshold(config: TopKConfig, memory: KeptPerBatch) -> Extra:
    """Batch-top-k's inference form: a JumpReLU with one threshold for all latents."""
    threshold = torch.where(memory.threshold < 0, memory.smallest, memory.threshold)
    if threshold < 0:
        raise ValueError("no step has been made, so there is no inference threshold")
    return Extra(threshold=threshold.expand(config.width))


def with_k(config: TopKConfig, memory: KeptPerToken) -> Extra:
    """The inference form of `top_k` and `abs_top_k`: a fixed k."""
    return Extra(k=config.k)


# Loss terms


def reconstruction(step: Step[SAEConfig], forward: Forward) -> Tensor:
    """Mean over tokens of ‖x − x̂‖²."""
    return losses.reconstruction(forward)


def prefixes(step: Step[MatryoshkaConfig], forward: Forward) -> Tensor:
    """Weighted sum of the reconstruction losses of Matryoshka's prefixes."""
    groups = len(step.config.fractions)
    return losses.reconstruction(forward, step.config.weights or (1 / groups,) * groups)


def aux_k(step: Step[TopKConfig], forward: Forward) -> Tensor:
    """Auxiliary loss: dead latents reconstruct the residual."""
    k = step.config.aux_k or max(1, step.sae.d_in // 2)
    return step.config.aux_coefficient * losses.aux_k(forward, k, signed=step.config.method == "abs_top_k")


def orthogonality(step: Step[OrtConfig], forward: Forward) -> Tensor:
    """OrtSAE's penalty on the cosine of each latent with its nearest neighbour."""
    return step.config.orthogonality * losses.orthogonality(step.sae.W_dec, *step.neighbors())


def l1(step: Step[StandardConfig], forward: Forward) -> Tensor:
    """L1 norm of the activations (for gated SAEs, of the gate's activations)."""
    return _sparsity(step) * losses.l1(forward.encoded.penalised)


def l1_of_norms(step: Step[StandardConfig], forward: Forward) -> Tensor:
    """L1 norm of the activations, weighted by the decoder rows' norms."""
    return _sparsity(step) * losses.l1(forward.encoded.acts, step.sae.W_dec.norm(dim=1))


def _sparsity(step: Step[StandardConfig]) -> float:
    return step.config.l1 * schedules.sparsity_warmup(step.config, step.number, step.steps)


@dataclass
class AnnealedP:
    """State of p-anneal."""

    p: float = 1.0
    """Current p."""
    scale: float = 1.0
    """Factor that keeps the loss term continuous when p changes."""


def lp(step: Step[PAnnealConfig], forward: Forward) -> Tensor:
    """Lp penalty on the activations; p decreases during training."""
    p, memory, acts = schedules.annealed_p(step.config, step.number, step.steps), step.memory, forward.encoded.acts
    if p != memory.p:
        with torch.no_grad():
            before, after = losses.lp(acts, memory.p), losses.lp(acts, p)
        memory.scale *= (before / after).item() if after > 0 else 1.0
        memory.p = p
    return _sparsity(step) * memory.scale * losses.lp(acts, p)


def target_l0(step: Step[JumpReLUConfig], forward: Forward) -> Tensor:
    """(L0 / target − 1)², through the straight-through gradient of the thresholds."""
    threshold_F: Any = step.sae.threshold
    encoded, config = forward.encoded, step.config
    if config.l0_gradient == "paper":
        assert encoded.pre is not None
        l0 = soft_l0(encoded.pre, threshold_F, config.bandwidth)
    else:
        l0 = published_soft_l0(encoded.acts, threshold_F, config.bandwidth)
    warmup = schedules.sparsity_warmup(config, step.number, step.steps)
    return config.sparsity_coefficient * warmup * (l0 / config.target_l0 - 1).square()


def gate_reconstruction(step: Step[GatedConfig], forward: Forward) -> Tensor:
    """Reconstruction loss of the gate's activations alone."""
    return losses.gate_reconstruction(forward)


# The table of methods

_TOP_K: dict[str, Callable[[Step[Any], Forward], Tensor]] = {"reconstruction": reconstruction, "aux_k": aux_k}
_PER_TOKEN: dict[str, Any] = {"memory": KeptPerToken, "after": follow_threshold, "finish": with_k}
_PER_BATCH: dict[str, Any] = {"memory": KeptPerBatch, "after": follow_threshold, "finish": with_threshold}
_RELU: dict[str, Any] = {"architecture": "standard", "initial_norm": 0.1, "median_start": False}
METHODS: dict[str, Method[Any]] = {
    "standard": Method(encode_relu, {"reconstruction": reconstruction, "l1": l1}, **_RELU),
    "april_update": Method(
        encode_relu, {"reconstruction": reconstruction, "l1": l1_of_norms}, unit_rows=False, **_RELU
    ),
    "p_anneal": Method(encode_relu, {"reconstruction": reconstruction, "lp": lp}, memory=AnnealedP, **_RELU),
    "top_k": Method(encode_top_k, _TOP_K, "topk", **_PER_TOKEN),
    "abs_top_k": Method(encode_abs_top_k, _TOP_K, "abs_topk", **_PER_TOKEN),
    "batch_top_k": Method(encode_batch_top_k, _TOP_K, "jumprelu", **_PER_BATCH),
    "matryoshka_batch_top_k": Method(
        encode_matryoshka, {"reconstruction": prefixes, "aux_k": aux_k}, "jumprelu", **_PER_BATCH
    ),
    "ort": Method(encode_batch_top_k, _TOP_K | {"orthogonality": orthogonality}, "jumprelu", **_PER_BATCH),
    "jump_relu": Method(
        encode_jump_relu, {"reconstruction": reconstruction, "l0": target_l0}, "jumprelu", "jumprelu",
        median_start=False, subtract_b_dec=False,
    ),
    "gated": Method(
        encode_gated, {"reconstruction": reconstruction, "l1": l1, "gate_reconstruction": gate_reconstruction},
        "gated", "gated", median_start=False,
    ),
}  # fmt: skip
