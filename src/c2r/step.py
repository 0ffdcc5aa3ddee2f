"""The interface of a training method: `Method`, and the `Step` that its functions receive.

A method consists of a few functions of a `Step`. If it keeps state between steps, it names a dataclass of numbers and
tensors; the instance is available as `Step.memory` and is saved in checkpoints.

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
    """The inputs of a method in one training step."""

    number: int
    """Number of the step, counted from 0."""
    steps: int
    """Number of steps of the whole run."""
    x_BD: Tensor
    encoder: Encoder
    config: C
    sparse_pays: bool
    """Whether the sparse path is faster for methods without a fixed k, because few latents fired in the last step."""
    neighbors: Callable[[], Neighbors]
    """Nearest neighbours of all decoder rows; searched at most once per step."""
    memory: Any = None
    """The method's state between steps, an instance of its `Method.memory`."""

    @property
    def sae(self) -> SAE:
        """The SAE being trained."""
        return self.encoder.sae


@dataclass(frozen=True)
class Method(Generic[C]):
    """A training method."""

    encode: Callable[[Step[C]], Encoded]
    """Computes the activations of a batch."""
    terms: dict[str, Callable[[Step[C], Forward], Tensor]]
    """Terms of the loss besides C²R: weighted scalars, which are summed."""
    architecture: Architecture
    """Architecture of the saved SAE."""
    trained_as: Architecture = "standard"
    """Architecture during training, which determines the trained weights."""
    memory: Callable[[], Any] | None = None
    """A dataclass of numbers and tensors with defaults for all fields; None for a method without state."""
    after: Callable[[Step[C], Encoded], None] | None = None
    """Called after each encoding to update `Step.memory`."""
    finish: Callable[[C, Any], Extra] | None = None
    """Maps configuration and memory to the parts of the saved SAE that are not trained.

    Raises:
        ValueError: no step has been made.
    """
    unit_rows: bool = True
    """Whether decoder rows are kept at norm 1: the gradient along them is removed, and they are renormalised."""
    initial_norm: float = 1.0
    """Initial norm of the decoder's and the encoder's rows."""
    median_start: bool = True
    """Whether b_dec is initialised to the geometric median of the first batch."""
    subtract_b_dec: bool = True
    """Whether the encoder's input is x − b_dec; False: x."""
