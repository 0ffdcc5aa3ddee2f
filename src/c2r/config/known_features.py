"""What a YAML may say about activations with known features: a section a preset, told apart by `preset`.

`docs/evaluations.md` says what each asks of an SAE.
"""

# Each preset narrows `preset` to its own name, which is how a YAML section finds its class.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from c2r.config.base import Frozen, NotNegative, Positive, Share
from c2r.config.faults import faults

Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class SyntheticConfig(Frozen):
    """What every preset has."""

    source: Literal["synthetic"]
    preset: str
    d_in: Annotated[int, Field(ge=2)]
    """Width of the activations."""
    feature_seed: int = 0
    """Of the features' directions; which of them fire follows the run's seed."""
    orthogonal: bool = True
    """Directions exactly orthogonal where they fit, else as orthogonal as their number allows; false: random."""
    magnitude_spread: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A feature that is on has a magnitude uniform in 1 ± this."""
    scale_by_parent: bool = True
    """A child's magnitude is multiplied by its parent's."""
    noise: NotNegative = 0.0
    """Standard deviation of Gaussian noise added to each coordinate."""
    bias: NotNegative = 0.0
    """Norm of a constant added to all activations."""
    topics: Positive = 1
    """Each token has one of so many topics, equally likely, and each root feature belongs to one."""
    topic_strength: Share = 0.0
    """c: a root is on 1 + c·(topics − 1) times as often in its own topic, 1 − c times as often elsewhere."""


class TreeConfig(SyntheticConfig):
    """Parents with mutually exclusive children, and independent features."""

    preset: Literal["tree"]
    d_in: Annotated[int, Field(ge=2)] = 96
    parents: Positive = 16
    children: Positive = 4
    """Of each parent, and of each child above the last level."""
    depth: Positive = 1
    """Levels below the parents."""
    independent: Count = 32
    parent_probability: Probability = 0.15
    child_probability: Share = 0.8
    """That one of its children is on where a feature with children is."""
    independent_probability: Probability = 0.03
    zipf: NotNegative = 0.0
    """Exponent: the n-th parent, independent feature or sibling is n^−zipf times as frequent as the first."""


class ForestConfig(TreeConfig):
    """The same deeper and wider, with frequencies that fall off: 512 features by default."""

    preset: Literal["forest"]
    depth: Positive = 2
    independent: Count = 176
    parent_probability: Probability = 0.2
    independent_probability: Probability = 0.1
    zipf: NotNegative = 0.5


class _WithBackground(SyntheticConfig):
    d_in: Annotated[int, Field(ge=2)] = 64
    background: Count = 30
    """Independent features beside those in question."""
    background_probability: Probability = 0.08


class PairConfig(_WithBackground):
    """A parent and a child that rarely fires alone."""

    preset: Literal["pair"]
    parent_alone: Probability = 0.2
    joint: Probability = 0.2
    epsilon: Probability = 0.01
    """Probability of the child alone."""

    @model_validator(mode="after")
    def _sum(self) -> PairConfig:
        total = self.parent_alone + self.joint + self.epsilon
        if self.joint + self.parent_alone == 0 or total >= 1:
            raise ValueError(
                f"parent_alone, joint, epsilon: got {self.parent_alone}, {self.joint}, {self.epsilon}; the first two "
                "must not both be 0, and all three must sum to less than 1"
            )
        return self


class RotationTrapConfig(_WithBackground):
    """A parent and a child that never fires alone: at some ratios a rotated pair is as sparse as the true one."""

    preset: Literal["rotation_trap"]
    ratio: NotNegative = 1.0
    """P(parent alone) / P(parent with child)."""
    parent_probability: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Of both together."""


class OverMergeTrapConfig(_WithBackground):
    """Pairs of distinct features with similar directions that fire independently."""

    preset: Literal["over_merge_trap"]
    pairs: Positive = 16
    kappa: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Cosine within a pair."""
    pair_probability: Probability = 0.08
    """Of each feature of a pair."""
    background: Count = 16


PRESETS: dict[str, type[SyntheticConfig]] = {
    "tree": TreeConfig,
    "forest": ForestConfig,
    "pair": PairConfig,
    "rotation_trap": RotationTrapConfig,
    "over_merge_trap": OverMergeTrapConfig,
}


def preset(name: str, **parameters: Any) -> SyntheticConfig:
    """The preset `name` with changed parameters.

    Raises:
        ValueError: no such preset, an unknown parameter, or a value that is refused; names it.
    """
    try:
        return of_preset({"source": "synthetic", "preset": name, **parameters})
    except ValidationError as error:
        said = faults(error, lambda _: list(PRESETS[name].model_fields))
        raise ValueError(f"preset {name}: " + "; ".join(said)) from None


def of_preset(section: dict[str, Any]) -> SyntheticConfig:
    """A section of a YAML as its preset's class.

    Raises:
        ValueError: no such preset (`pydantic.ValidationError` for all else).
    """
    name = section.get("preset")
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}; accepted are {', '.join(PRESETS)}")
    return PRESETS[name].model_validate(section)
