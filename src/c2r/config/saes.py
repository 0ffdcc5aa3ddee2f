"""Configuration of one SAE: one section per method, selected by `method`; and of C²R.

Defaults of `null` depend on the number of steps, so that warm-up does not take up most of a short run. For a table of
methods with their papers see `docs/explanation/methods.md`.
"""

# Each class narrows the type of `method` to its own name.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from c2r.config.base import Frozen, NotNegative, Positive, Share, at_home
from c2r.config.hooks import Hook
from c2r.layout import RESERVED


class ConsistencyConfig(Frozen):
    """The C²R penalty: its strength, in one of two units, and how it is computed."""

    strength: NotNegative | None = None
    """Strength as the dimensionless ρ = λ·(B/F)^(α/2), for batch size B and width F (published setting: 0.884). Give
    either `strength` or `lambda`."""
    lam: NotNegative | None = Field(default=None, alias="lambda")
    """Strength as the paper's λ. Its effect depends on batch size, width and neighbour search: a value tuned with
    `chunked` neighbours is stronger with `exact` and `lagged`, which find closer neighbours."""
    alpha: NotNegative = 1.0
    """Exponent α of the summed activation norms; 0: the penalty ignores activations."""
    margin: Annotated[float, Field(ge=0, lt=1)] | Literal["floor"] = 0.0
    """Cosine similarity above which a pair of latents is penalised. floor: √(2 ln F / D), the value for random
    directions with F latents in D dimensions."""
    every: Positive = 1
    """Apply the penalty only in every n-th step, multiplied by n to compensate."""
    start: Annotated[int, Field(ge=0)] = 0
    """First step in which the penalty applies, counted from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps after `start` over which the strength rises linearly from 0."""
    neighbors: Literal["lagged", "exact", "chunked"] = "lagged"
    """Search for each latent's nearest neighbour. lagged: a table of which some rows are updated per step, fast. exact:
    a full search in each step that applies the penalty. chunked: only within random chunks of latents, as published,
    which misses most true neighbours in wide SAEs."""
    ablation: Literal["none", "unit_cosine", "shuffled_norms"] = "none"
    """Ablation of the penalty. unit_cosine: set all cosines to 1, a group lasso. shuffled_norms: weight each pair by
    the activation norms of a random other pair, a control that keeps the pressure on angles but not its targets."""

    @model_validator(mode="after")
    def _one_unit(self) -> ConsistencyConfig:
        if (self.strength is None) == (self.lam is None):
            raise ValueError(
                f"strength, lambda: exactly one of the two is needed; got strength={self.strength}, lambda={self.lam}"
            )
        return self


class SAEConfig(Frozen):
    """Settings shared by all methods."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the SAE and of its folder in the output folder."""
    method: str
    """Training method; `docs/explanation/methods.md` describes all."""
    width: Annotated[int, Field(ge=2)]
    """Number of latents F."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Transformer block whose activations the SAE is trained on, counted from 0; null: `model.layer`."""
    hook: Hook | None = None
    """Place in the block; null: `model.hook`."""
    seed: int | None = None
    """Random seed of the initialisation; null: the run's `seed`, so that comparable SAEs of a run start from
    the same weights."""
    init: Annotated[Path, BeforeValidator(at_home)] | None = None
    """Folder of an SAE to fine-tune, with a fresh optimiser. It needs the same widths and a compatible method; null:
    start from random weights."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this norm; null: no clipping."""
    dead_after_tokens: Positive = 10_000_000
    """Number of tokens without firing after which a latent counts as dead."""
    c2r: ConsistencyConfig | None = None
    """The C²R penalty; null: train without it."""

    @model_validator(mode="after")
    def _name(self) -> SAEConfig:
        if self.name.lower() in RESERVED:
            raise ValueError(
                f"name: got {self.name!r}, which is reserved in a run's folder; reserved are {', '.join(RESERVED)}"
            )
        return self


class TopKConfig(SAEConfig):
    """TopK: the k largest positive pre-activations of each token fire."""

    method: Literal["top_k"] = "top_k"
    k: Positive
    """Number of active latents per token (for batch methods, on average over the batch)."""
    k_anneal: Share = 0.01
    """Fraction of the steps over which k falls linearly from the activations' width to its configured value."""
    aux_coefficient: NotNegative = 1 / 32
    """Weight of the auxiliary loss (AuxK), which revives dead latents by letting them reconstruct the residual."""
    aux_k: Positive | None = None
    """Number of dead latents per token that reconstruct the residual in the auxiliary loss; null: half the activations'
    width."""
    threshold_start: Annotated[int, Field(ge=0)] | None = None
    """Step after which the moving average of the inference threshold begins; null: 1000 (as published), but at most
    half of the steps."""
    threshold_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay per step of the inference threshold's moving average; null: 0.999 (as published), less in a short run,
    where the average would lag behind."""

    @model_validator(mode="after")
    def _check(self) -> TopKConfig:
        if self.k > self.width:
            raise ValueError(f"k: got {self.k}, more than the width {self.width}; accepted are 1 to {self.width}")
        return self


class AbsTopKConfig(TopKConfig):
    """AbsTopK: the k pre-activations of each token that are largest in absolute value fire, with their sign."""

    method: Literal["abs_top_k"] = "abs_top_k"


class BatchTopKConfig(TopKConfig):
    """BatchTopK: the B·k largest positive pre-activations of B tokens fire; inference uses a learnt threshold."""

    method: Literal["batch_top_k"] = "batch_top_k"


class MatryoshkaConfig(TopKConfig):
    """Matryoshka BatchTopK: nested prefixes of the latents must each reconstruct the activations."""

    method: Literal["matryoshka_batch_top_k"] = "matryoshka_batch_top_k"
    fractions: tuple[Annotated[float, Field(gt=0)], ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Sizes of the groups of latents as fractions of the width, in order; they must sum to 1. Each prefix of groups
    reconstructs the activations."""
    weights: tuple[NotNegative, ...] | None = None
    """Weight of each prefix's reconstruction loss; null: equal weights that sum to 1."""

    @model_validator(mode="after")
    def _groups(self) -> MatryoshkaConfig:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"fractions: got {self.fractions}, which sum to {sum(self.fractions):.4f}; they must sum to 1"
            )
        if self.weights is not None and len(self.weights) != len(self.fractions):
            raise ValueError(
                f"weights: got {len(self.weights)} for {len(self.fractions)} fractions; give one per fraction"
            )
        if min(group_ends(self.fractions, self.width)) < 1 or len(set(group_ends(self.fractions, self.width))) < len(
            self.fractions
        ):
            raise ValueError(f"fractions: got {self.fractions}; at width {self.width}, a group would be empty")
        return self


class OrtConfig(TopKConfig):
    """OrtSAE: BatchTopK with a penalty on each latent's cosine similarity to its nearest neighbour."""

    method: Literal["ort"] = "ort"
    orthogonality: NotNegative = 0.25
    """Weight γ of the penalty γ · mean relu(max cos)²."""


class StandardConfig(SAEConfig):
    """ReLU with an L1 penalty and decoder rows of unit norm."""

    method: Literal["standard"] = "standard"
    l1: NotNegative = 0.1
    """Weight of the sparsity penalty, for activations scaled to a mean squared norm of 1."""
    sparsity_warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps over which the sparsity penalty rises linearly from 0; null: 2000, but at most a tenth of the
    steps."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Gradients are clipped to this norm; null: no clipping."""


class AprilUpdateConfig(StandardConfig):
    """ReLU with an L1 penalty weighted by the norms of the decoder rows, which are not constrained."""

    method: Literal["april_update"] = "april_update"
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this norm; null: no clipping."""


class PAnnealConfig(StandardConfig):
    """ReLU with an Lp penalty whose p decreases from 1 during training."""

    method: Literal["p_anneal"] = "p_anneal"
    p_end: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Final value of p."""
    anneal_from: Share = 0.1
    """Fraction of the steps at which p begins to decrease from 1, in ten stages."""
    anneal_to: Share = 0.8
    """Fraction of the steps by which p has reached `p_end`."""

    @model_validator(mode="after")
    def _order(self) -> PAnnealConfig:
        if self.anneal_from >= self.anneal_to:
            raise ValueError(f"anneal_from: got {self.anneal_from}; accepted is less than anneal_to {self.anneal_to}")
        return self


class GatedConfig(StandardConfig):
    """Gated SAE: a gate decides which latents fire, a magnitude how strongly; the L1 penalty is on the gate."""

    method: Literal["gated"] = "gated"


class JumpReLUConfig(SAEConfig):
    """JumpReLU: one learnt threshold per latent; a penalty draws L0 to a target, with straight-through gradients."""

    method: Literal["jump_relu"] = "jump_relu"
    target_l0: Annotated[float, Field(gt=0)]
    """Target for the mean number of active latents per token."""
    bandwidth: Annotated[float, Field(gt=0)] = 1e-3
    """Width ε of the rectangular kernel that approximates the derivative at the threshold."""
    threshold_init: Annotated[float, Field(ge=0)] = 1e-3
    """Initial value of all thresholds."""
    l0_gradient: Literal["paper", "published"] = "paper"
    """Which values the L0 penalty's gradient compares with the threshold. paper: pre-activations (arXiv 2407.14435, eq.
    11 and 12). published: activations after the jump, as in the published trainers' code. See
    `docs/explanation/methods.md`."""
    sparsity_coefficient: NotNegative = 1.0
    """Weight of the L0 penalty (L0 / `target_l0` − 1)²."""
    sparsity_warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps over which the sparsity penalty rises linearly from 0; null: 2000, but at most a tenth of the
    steps."""


SECTIONS: dict[str, type[SAEConfig]] = {
    config.model_fields["method"].default: config
    for config in (
        StandardConfig, AprilUpdateConfig, PAnnealConfig, TopKConfig, BatchTopKConfig, MatryoshkaConfig, OrtConfig,
        JumpReLUConfig, GatedConfig, AbsTopKConfig,
    )
}  # fmt: skip


def _of_its_method(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    method = value.get("method", "batch_top_k")
    if method not in SECTIONS:
        raise ValueError(f"method: got {method!r}; accepted are {', '.join(SECTIONS)}")
    return SECTIONS[method].model_validate(value)


AnySAE = Annotated[SerializeAsAny[SAEConfig], BeforeValidator(_of_its_method)]
"""One SAE of a run, validated by the class of its `method`; the default is `batch_top_k`."""


def group_ends(fractions: tuple[float, ...], width: int) -> tuple[int, ...]:
    """Ends of Matryoshka's prefixes: cumulative group sizes, with the rounding remainder in the last group."""
    sizes = [int(fraction * width) for fraction in fractions[:-1]]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return (*ends, width)
