"""Tensors on disk that several evaluations need, such as activations and probes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from c2r.identity import source_digest
from c2r.storage import whole
from c2r.version import __version__

Tensors = dict[str, Tensor]


class Cache:
    """Tensors stored under a key of everything they depend on.

    The key includes the versions of c2r and torch and a digest of c2r's source, so a change of the code invalidates it.
    If the folder cannot be written, evaluations continue without the cache and say so once.

    Arguments:
        folder: None: `$C2R_CACHE`, or `c2r` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        self.folder = (folder or Path(os.environ.get("C2R_CACHE", home / "c2r"))).expanduser()
        self._said = False

    def get(self, kind: str, key: dict[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """The tensors of `key`: from disk if they are there and intact, else from `make`."""
        code = {"c2r": __version__, "source": source_digest(), "torch": torch.__version__}
        text = json.dumps({**key, **code}, sort_keys=True, default=str)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
        if path.is_file():
            with contextlib.suppress(SafetensorError, OSError):  # truncated or damaged: computed again
                return load_file(path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as partial:
                save_file(tensors, partial, metadata={"key": text})
        except (SafetensorError, OSError) as error:
            if not self._said:
                self._said = True
                Console(stderr=True).print(f"nothing is kept for later evaluations: cannot write {path}: {error}")
        return tensors
