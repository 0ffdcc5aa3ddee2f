"""What a YAML may say about one SAE: a section a method, told apart by `method`; and about C²R.

`null` defaults are settled from the length of the run, so that a short run is not all warm-up; `docs/methods.md` has
the table of methods with their papers.
"""

# Each method narrows `method` to its own name, which is how a YAML section finds its class.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from c2r.config.base import Frozen, NotNegative, Positive, Share, at_home
from c2r.config.hooks import Hook

RESERVED = (
    "run.yaml", "metrics.jsonl", "summary.json", "report.html", "evaluations", "checkpoints",
    "known_features", "known_features.json", "faulty", "tensorboard", "wandb",
)  # fmt: skip
"""What else lies in a run's folder; no SAE can be called so."""


class ConsistencyConfig(Frozen):
    """C²R: how strongly, in one of two units, and how it is computed."""

    strength: NotNegative | None = None
    """Dimensionless ρ (published setting: 0.884). See `c2r.penalty.lambda_of_strength`."""
    lam: NotNegative | None = Field(default=None, alias="lambda")
    """The paper's λ; depends on batch size, width and the neighbour search: tuned with "chunked", it presses
    harder under "exact" and "lagged", which miss no neighbour."""
    alpha: NotNegative = 1.0
    """Exponent of the summed norms; 0 leaves the activations out."""
    margin: Annotated[float, Field(ge=0, lt=1)] | Literal["floor"] = 0.0
    """The cosine is counted from here on; "floor" is what random directions of this shape have, √(2 ln F / D)."""
    every: Positive = 1
    """Applied in every n-th step, then multiplied by n."""
    start: Annotated[int, Field(ge=0)] = 0
    """First step that applies it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps from `start` over which the strength rises linearly from 0."""
    neighbors: Literal["lagged", "exact", "chunked"] = "lagged"
    ablation: Literal["none", "unit_cosine", "shuffled_norms"] = "none"
    """"unit_cosine" takes every pair's cosine as 1 (a group lasso); "shuffled_norms" gives each pair the norms of
    another (a control: the same pressure on angles, at random)."""

    @model_validator(mode="after")
    def _one_unit(self) -> ConsistencyConfig:
        if (self.strength is None) == (self.lam is None):
            raise ValueError(
                f"strength, lambda: exactly one of the two is needed, got strength={self.strength} lambda={self.lam}"
            )
        return self


class SAEConfig(Frozen):
    """What every method has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Also the name of its folder."""
    method: str
    width: Annotated[int, Field(ge=2)]
    """F, the number of latents."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Block whose activations it learns; null: `model.layer`."""
    hook: Hook | None = None
    """null: `model.hook`."""
    seed: int | None = None
    """Of the initialisation; null: the run's seed, so that the SAEs of a run are paired."""
    init: Annotated[Path, BeforeValidator(at_home)] | None = None
    """Folder of an SAE to start from (same widths, fitting method): fine-tuning with a fresh optimiser."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    dead_after_tokens: Positive = 10_000_000
    """A latent that has not fired for so many tokens is dead."""
    c2r: ConsistencyConfig | None = None
    """None (null) trains without."""

    @model_validator(mode="after")
    def _name(self) -> SAEConfig:
        if self.name.lower() in RESERVED:
            raise ValueError(f"name: got {self.name!r}, which a run's folder has already; {RESERVED} cannot be used")
        return self


class TopKConfig(SAEConfig):
    """The k largest positive pre-activations of each token."""

    method: Literal["top_k"] = "top_k"
    k: Positive
    """Active latents a token."""
    k_anneal: Share = 0.01
    """k falls linearly from the activations' width to its value over this fraction of the steps."""
    aux_coefficient: NotNegative = 1 / 32
    aux_k: Positive | None = None
    """Dead latents a token that reconstruct the residual; null: half the activations' width."""
    threshold_start: Annotated[int, Field(ge=0)] | None = None
    """Step after which the threshold is tracked; null: 1000 (as published), half of a short run."""
    threshold_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of its moving average; null: 0.999 (as published), less in a short run, whose threshold it could not follow."""

    @model_validator(mode="after")
    def _check(self) -> TopKConfig:
        if self.k > self.width:
            raise ValueError(f"k: got {self.k}, more than the width {self.width}; accepted are 1 to {self.width}")
        return self


class AbsTopKConfig(TopKConfig):
    """The k pre-activations of each token that are largest in absolute value, with their sign."""

    method: Literal["abs_top_k"] = "abs_top_k"


class BatchTopKConfig(TopKConfig):
    """The B·k largest positive pre-activations of each batch; inference by a learnt threshold."""

    method: Literal["batch_top_k"] = "batch_top_k"


class MatryoshkaConfig(TopKConfig):
    """BatchTopK whose first latents must reconstruct alone."""

    method: Literal["matryoshka_batch_top_k"] = "matryoshka_batch_top_k"
    fractions: tuple[Annotated[float, Field(gt=0)], ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Shares of the width that the groups have, from the first latents on; they sum to 1."""
    weights: tuple[NotNegative, ...] | None = None
    """Weight of each prefix's reconstruction; null: equal, summing to 1."""

    @model_validator(mode="after")
    def _groups(self) -> MatryoshkaConfig:
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions: got {self.fractions}, which sum to {sum(self.fractions):.4f}; they must to 1")
        if self.weights is not None and len(self.weights) != len(self.fractions):
            raise ValueError(f"weights: got {len(self.weights)} for {len(self.fractions)} fractions; give one for each")
        if min(group_ends(self.fractions, self.width)) < 1 or len(set(group_ends(self.fractions, self.width))) < len(
            self.fractions
        ):
            raise ValueError(f"fractions: got {self.fractions}; at width {self.width} a group would be empty")
        return self


class OrtConfig(TopKConfig):
    """BatchTopK with OrtSAE's penalty on each latent's nearest cosine."""

    method: Literal["ort"] = "ort"
    orthogonality: NotNegative = 0.25
    """γ of γ · mean relu(max cos)²."""


class StandardConfig(SAEConfig):
    """ReLU with an L1 penalty, decoder rows of unit norm."""

    method: Literal["standard"] = "standard"
    l1: NotNegative = 0.1
    """Weight of mean ‖f‖₁, on activations of mean square norm 1."""
    sparsity_warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up of the sparsity term; null: 2000, a tenth of a short run."""
    clip: Annotated[float, Field(gt=0)] | None = None


class AprilUpdateConfig(StandardConfig):
    """ReLU with an L1 penalty weighted by the decoder's norms, which are free."""

    method: Literal["april_update"] = "april_update"
    clip: Annotated[float, Field(gt=0)] | None = 1.0


class PAnnealConfig(StandardConfig):
    """ReLU with an Lp penalty whose p falls from 1."""

    method: Literal["p_anneal"] = "p_anneal"
    p_end: Annotated[float, Field(gt=0, le=1)] = 0.2
    anneal_from: Share = 0.1
    """Fraction of the steps at which p starts to fall from 1, in ten stages; it reaches `p_end` at `anneal_to`."""
    anneal_to: Share = 0.8

    @model_validator(mode="after")
    def _order(self) -> PAnnealConfig:
        if self.anneal_from >= self.anneal_to:
            raise ValueError(f"anneal_from: got {self.anneal_from}; accepted is less than anneal_to {self.anneal_to}")
        return self


class GatedConfig(StandardConfig):
    """A gate decides which latents fire, a magnitude how much; the L1 penalty is on the gate."""

    method: Literal["gated"] = "gated"


class JumpReLUConfig(SAEConfig):
    """A learnt threshold a latent, its L0 drawn to a target through straight-through gradients."""

    method: Literal["jump_relu"] = "jump_relu"
    target_l0: Annotated[float, Field(gt=0)]
    bandwidth: Annotated[float, Field(gt=0)] = 1e-3
    """Width of the rectangle that stands in for the jump's derivative."""
    threshold_init: Annotated[float, Field(ge=0)] = 1e-3
    l0_gradient: Literal["paper", "published"] = "paper"
    """What the L0 term's gradient counts as near the threshold: "paper" pre-activations (arXiv 2407.14435, eq. 11 and
    12), "published" activations after the jump, as the published trainers' code does; `docs/methods.md` compares."""
    sparsity_coefficient: NotNegative = 1.0
    sparsity_warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up of the sparsity term; null: 2000, a tenth of a short run."""


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
"""One SAE of a run, of the class that `method` names; a section without `method` is a BatchTopK."""


def group_ends(fractions: tuple[float, ...], width: int) -> tuple[int, ...]:
    """Where Matryoshka's prefixes end: cumulated group sizes, the last group taking what rounding leaves."""
    sizes = [int(fraction * width) for fraction in fractions[:-1]]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return (*ends, width)
