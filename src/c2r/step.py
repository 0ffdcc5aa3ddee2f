"""What a method is, and all that it sees of one training step.

A method is a handful of functions of a `Step`. One that remembers something between steps names a dataclass of numbers
and tensors for it, which `Step.memory` holds and checkpoints save as it is.

B tokens in a batch · D width of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from c2r.config.saes import SAEConfig
from c2r.losses import Encoded, Forward
from c2r.neighbors import Neighbors
from c2r.sae.encoder import Encoder
from c2r.sae.model import SAE, Architecture, Extra

C = TypeVar("C", bound=SAEConfig, covariant=True)


@dataclass(frozen=True)
class Step(Generic[C]):
    """All that a method sees of one training step."""

    number: int
    """Counted from 0."""
    steps: int
    """Steps of the whole run."""
    x_BD: Tensor
    encoder: Encoder
    config: C
    sparse_pays: bool
    """Few activations fired in the last step: a method without a fixed k is faster on the sparse path."""
    neighbors: Callable[[], Neighbors]
    """Nearest neighbours of all decoder rows; searched at most once per step."""
    memory: Any = None
    """What the method keeps between steps: an instance of its `Method.memory`."""

    @property
    def sae(self) -> SAE:
        """The weights in training."""
        return self.encoder.sae


@dataclass(frozen=True)
class Method(Generic[C]):
    """One method."""

    encode: Callable[[Step[C]], Encoded]
    """Activations of a batch."""
    terms: dict[str, Callable[[Step[C], Forward], Tensor]]
    """What is minimised besides C²R: weighted scalars, which are summed."""
    architecture: Architecture
    """Of the saved SAE."""
    trained_as: Architecture = "standard"
    """Which weights are trained."""
    memory: Callable[[], Any] | None = None
    """A dataclass of numbers and tensors, built without arguments; None for a method that keeps nothing."""
    after: Callable[[Step[C], Encoded], None] | None = None
    """Called after each encoding to update `Step.memory`."""
    finish: Callable[[C, Any], Extra] | None = None
    """From configuration and memory to what the saved SAE has besides the trained weights.

    Raises:
        ValueError: no step was made yet.
    """
    unit_rows: bool = True
    """Decoder rows are held at norm 1: the gradient along them is removed, and they are renormalised."""
    initial_norm: float = 1.0
    """Of the decoder's and encoder's rows."""
    median_start: bool = True
    """b_dec starts at the geometric median of the first batch."""
    subtract_b_dec: bool = True
    """Whether x − b_dec or x enters the encoder."""
