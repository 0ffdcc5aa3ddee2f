"""c2r trains sparse autoencoders with cross-sample consistency regularisation (C²R), and measures what it changes.

Public names load on first use, so that `c2r --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from c2r.version import __version__

if TYPE_CHECKING:
    from c2r.config.load import load_config
    from c2r.config.run import RunConfig
    from c2r.eval.suite import evaluate
    from c2r.interop.saelens import load_sae as load
    from c2r.kernels.codes import Codes
    from c2r.neighbors import Neighbors, NeighborTable, nearest_neighbors
    from c2r.penalty import consistency_penalty, lambda_of_strength, strength_of_lambda
    from c2r.sae.model import SAE
    from c2r.training.trainer import train

__all__ = [
    "SAE",
    "Codes",
    "NeighborTable",
    "Neighbors",
    "RunConfig",
    "__version__",
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
    "SAE": "sae.model",
    "Codes": "kernels.codes",
    "NeighborTable": "neighbors",
    "Neighbors": "neighbors",
    "RunConfig": "config.run",
    "consistency_penalty": "penalty",
    "evaluate": "eval.suite",
    "lambda_of_strength": "penalty",
    "load": "interop.saelens",
    "load_config": "config.load",
    "nearest_neighbors": "neighbors",
    "strength_of_lambda": "penalty",
    "train": "training.trainer",
}
_RENAMED = {"load": "load_sae"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'c2r' has no attribute {name!r}")
    return getattr(import_module(f"c2r.{_WHERE[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
