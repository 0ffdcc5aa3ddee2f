"""c2r: sparse autoencoders whose features are neither split over near-duplicates nor absorbed by their children.

Public names load on first use, so that `c2r --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from c2r.codes import Codes
    from c2r.config import RunConfig, load_config
    from c2r.eval.suite import evaluate
    from c2r.interop.saelens import load_sae as load
    from c2r.neighbors import Neighbors, NeighborTable, nearest_neighbors
    from c2r.penalty import consistency_penalty, lambda_of_strength, strength_of_lambda
    from c2r.sae.base import SAE
    from c2r.train.trainer import train

__version__ = "0.1.0"
__all__ = [
    "SAE",
    "Codes",
    "NeighborTable",
    "Neighbors",
    "RunConfig",
    "consistency_penalty",
    "evaluate",
    "lambda_of_strength",
    "load",
    "load_config",
    "nearest_neighbors",
    "strength_of_lambda",
    "train",
]

_WHERE = {
    "SAE": "sae.base",
    "Codes": "codes",
    "NeighborTable": "neighbors",
    "Neighbors": "neighbors",
    "RunConfig": "config",
    "consistency_penalty": "penalty",
    "evaluate": "eval.suite",
    "lambda_of_strength": "penalty",
    "load": "interop.saelens",
    "load_config": "config",
    "nearest_neighbors": "neighbors",
    "strength_of_lambda": "penalty",
    "train": "train.trainer",
}
_RENAMED = {"load": "load_sae"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'c2r' has no attribute {name!r}")
    return getattr(import_module(f"c2r.{_WHERE[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
