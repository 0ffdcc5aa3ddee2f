"""Configuration of synthetic activations with known features: one section per preset, selected by `preset`.

`docs/results/known-features.md` explains what each preset tests.
"""

# Each class narrows the type of `preset` to its own name.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from c2r.config.base import Frozen, NotNegative, Positive, Share
from c2r.config.faults import faults

Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class SyntheticConfig(Frozen):
    """Settings shared by all presets."""

    source: Literal["synthetic"]
    """Must be `synthetic`."""
    preset: str
    """Name of the preset."""
    d_in: Annotated[int, Field(ge=2)]
    """Width of the activations."""
    feature_seed: int = 0
    """Random seed of the feature directions. Which features fire depends on the run's `seed`."""
    orthogonal: bool = True
    """Whether feature directions are orthogonal (as nearly as possible if there are more than `d_in`); false:
    random."""
    magnitude_spread: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Half-width of the magnitudes' range: the magnitude of an active feature is uniform in 1 ± this value."""
    scale_by_parent: bool = True
    """Whether a child's magnitude is multiplied by its parent's."""
    noise: NotNegative = 0.0
    """Standard deviation of Gaussian noise added to each coordinate."""
    bias: NotNegative = 0.0
    """Norm of a constant vector added to all activations."""
    topics: Positive = 1
    """Number of topics. Each token has one topic, all equally likely; each root feature (without parent) belongs to
    one."""
    topic_strength: Share = 0.0
    """Strength c of the topics, in [0, 1]: a root feature is active 1 + c·(topics − 1) times as often in its own topic
    and 1 − c times as often elsewhere."""


class TreeConfig(SyntheticConfig):
    """Trees of parents with mutually exclusive children, plus independent features."""

    preset: Literal["tree"]
    d_in: Annotated[int, Field(ge=2)] = 96
    """Width of the activations."""
    parents: Positive = 16
    """Number of root features with children."""
    children: Positive = 4
    """Number of children of each parent, and of each child above the last level."""
    depth: Positive = 1
    """Number of levels below the parents."""
    independent: Count = 32
    """Number of independent features without children."""
    parent_probability: Probability = 0.15
    """Probability per token that a parent is active (with `zipf`: the most frequent parent)."""
    child_probability: Share = 0.8
    """Probability that exactly one of its children is active when a feature with children is."""
    independent_probability: Probability = 0.03
    """Probability per token that an independent feature is active (with `zipf`: the most frequent one)."""
    zipf: NotNegative = 0.0
    """Exponent of Zipf's law: the n-th parent, independent feature or sibling is n^−zipf times as frequent as the
    first."""


class ForestConfig(TreeConfig):
    """A deeper, wider `tree` with Zipf-distributed frequencies: 512 features by default."""

    preset: Literal["forest"]
    depth: Positive = 2
    """Number of levels below the parents."""
    independent: Count = 176
    """Number of independent features without children."""
    parent_probability: Probability = 0.2
    """Probability per token that the most frequent parent is active."""
    independent_probability: Probability = 0.1
    """Probability per token that the most frequent independent feature is active."""
    zipf: NotNegative = 0.5
    """Exponent of Zipf's law: the n-th parent, independent feature or sibling is n^−zipf times as frequent as the
    first."""


class _WithBackground(SyntheticConfig):
    d_in: Annotated[int, Field(ge=2)] = 64
    """Width of the activations."""
    background: Count = 30
    """Number of additional independent features."""
    background_probability: Probability = 0.08
    """Probability per token that a background feature is active."""


class PairConfig(_WithBackground):
    """A parent and a child that rarely fires alone."""

    preset: Literal["pair"]
    parent_alone: Probability = 0.2
    """Probability per token that the parent is active without the child."""
    joint: Probability = 0.2
    """Probability per token that both are active."""
    epsilon: Probability = 0.01
    """Probability per token that the child is active without the parent."""

    @model_validator(mode="after")
    def _sum(self) -> PairConfig:
        total = self.parent_alone + self.joint + self.epsilon
        if self.joint + self.parent_alone == 0 or total >= 1:
            raise ValueError(
                f"parent_alone, joint, epsilon: got {self.parent_alone}, {self.joint}, {self.epsilon}; at least "
                "one of the first two must be above 0, and all three must sum to less than 1"
            )
        return self


class RotationTrapConfig(_WithBackground):
    """A parent and a child that never fires alone: at some ratios, rotated latents are as sparse as the true ones."""

    preset: Literal["rotation_trap"]
    ratio: NotNegative = 1.0
    """Ratio P(parent alone) / P(parent with child)."""
    parent_probability: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Probability per token that the parent is active, with or without the child."""


class OverMergeTrapConfig(_WithBackground):
    """Pairs of distinct features with similar directions that fire independently."""

    preset: Literal["over_merge_trap"]
    pairs: Positive = 16
    """Number of pairs."""
    kappa: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Cosine similarity of the two features of a pair."""
    pair_probability: Probability = 0.08
    """Probability per token that a feature of a pair is active."""
    background: Count = 16
    """Number of additional independent features."""


PRESETS: dict[str, type[SyntheticConfig]] = {
    "tree": TreeConfig,
    "forest": ForestConfig,
    "pair": PairConfig,
    "rotation_trap": RotationTrapConfig,
    "over_merge_trap": OverMergeTrapConfig,
}


def preset(name: str, **parameters: Any) -> SyntheticConfig:
    """The preset `name` with the given parameters changed.

    Raises:
        ValueError: no such preset, an unknown parameter, or an invalid value; names it.
    """
    try:
        return of_preset({"source": "synthetic", "preset": name, **parameters})
    except ValidationError as error:
        said = faults(error, lambda _: list(PRESETS[name].model_fields))
        raise ValueError(f"preset {name}: " + "; ".join(said)) from None


def of_preset(section: dict[str, Any]) -> SyntheticConfig:
    """Validate a section with the class of its preset.

    Raises:
        ValueError: no such preset.
        pydantic.ValidationError: any other invalid value.
    """
    name = section.get("preset")
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}; accepted are {', '.join(PRESETS)}")
    return PRESETS[name].model_validate(section)
