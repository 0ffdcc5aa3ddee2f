"""What the evaluations of one call share: the language model, the text, its activations, and a cache on disk.

n real tokens · D width of the activations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.autointerp.judge import JudgeConfig
from c2r.eval.results import Metrics
from c2r.identity import source_digest
from c2r.language_model.model import LanguageModel
from c2r.progress import progress_bar
from c2r.sae.model import SAE
from c2r.storage import hidden
from c2r.text.packing import Rows, Skipped, held_out_kept, packed_rows
from c2r.version import __version__

__all__ = [  # with what evaluations need of other modules
    "FAILURES",
    "Bench",
    "Cache",
    "Evaluation",
    "ModelFree",
    "Outcome",
    "Setting",
    "Tensors",
    "TextActivations",
    "each",
    "failure",
    "progress_bar",
    "rows_digest",
]

Tensors = dict[str, Tensor]
_POSITIONS = 4096
"""Most positions of a batch of rows, so that a model's states of a batch are not large."""
FAILURES = (ValueError, RuntimeError, ArithmeticError, OSError)
"""What an SAE, a text or the machine may be at fault for, and what ends one evaluation alone. Anything else is our
fault, and is shown whole."""


@dataclass
class Outcome:
    """What one evaluation says of one SAE: a result file, and its share of the table."""

    sae: str
    evaluation: str
    """SAEBench's type id where it has one."""
    metrics: Metrics = field(default_factory=dict)
    summary: dict[str, float | None] = field(default_factory=dict)
    """What the table and `summary.json` show; None where there is no figure."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of this evaluation, beside the call's own."""
    details: list[dict[str, Any]] = field(default_factory=list)
    unstructured: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    """The file is `<sae>_<this>.json`; None: `evaluation`."""
    error: str | None = None
    """Why there is no result; the other SAEs' results stand."""


class Cache:
    """Tensors on disk under a key of everything they depend on; made once, then read.

    The key also has the versions of c2r and torch, and a digest of c2r's own source, so that any change of the code
    that evaluates makes them again. A folder that cannot be written costs the cache, and no result; it is said once.

    Arguments:
        folder: None: `$C2R_CACHE`, or `c2r` in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        self.folder = (folder or Path(os.environ.get("C2R_CACHE", home / "c2r"))).expanduser()
        self._said = False

    def get(self, kind: str, key: dict[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """The tensors of `key`, from disk if they are there whole, else from `make`."""
        code = {"c2r": __version__, "source": source_digest(), "torch": torch.__version__}
        text = json.dumps({**key, **code}, sort_keys=True, default=str)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
        if path.is_file():
            with contextlib.suppress(SafetensorError, OSError):  # cut short or damaged: made again
                return load_file(path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        partial = hidden(path, "partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, partial, metadata={"key": text})
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except (SafetensorError, OSError) as error:
            if not self._said:
                self._said = True
                Console(stderr=True).print(f"nothing is kept for later evaluations: cannot write {path}: {error}")
        return tensors


class TextActivations(NamedTuple):
    """The hook's activations on the evaluation's text, real tokens only, in order."""

    x_nD: Tensor
    ids_n: Tensor
    row_n: Tensor
    """Which row of the text each token stands in."""
    position_n: Tensor
    """Its position in that row."""


@dataclass
class Bench:
    """One language model at one hook point, one text."""

    lm: LanguageModel
    model: ModelConfig
    data: DataConfig
    tokens: int
    seed: int
    cache: Cache
    console: Console
    judge: JudgeConfig | None = None
    """Who is asked by evaluations that ask a language model over the network."""
    probe_data: str | None = None
    """Labelled texts for sparse probing: see `c2r.eval.probing.labelled`; None: the standard library's."""
    counted: dict[str, Any] = field(default_factory=dict)
    """What `c2r.eval.counted.counted` found, by SAE."""

    @property
    def model_key(self) -> dict[str, Any]:
        """What activations of this model at this hook point depend on."""
        from transformers import __version__ as transformers_version

        return {"model": self.model.model_dump(mode="json"), "identity": self.lm.identity, "lib": transformers_version}

    @contextlib.contextmanager
    def lm_on_cpu(self) -> Iterator[None]:
        """While another language model needs the device's memory."""
        device = self.lm.device
        self.lm.model.to("cpu")
        try:
            yield
        finally:
            self.lm.model.to(device)

    def rows(self) -> Iterator[Rows]:
        """The held-out text in batches of rows, until `tokens` real ones have passed."""
        size = max(1, min(16, _POSITIONS // self.data.context))
        seen = 0
        settings: dict[str, Any] = {"seed": self.seed, "held_out": True, "rows": size, "skipped": self.skipped}
        settings["embeddings"] = self.lm.embeddings
        for part in packed_rows(self.data, self.lm.tokenizer, **settings):
            yield part
            seen += int(part.real.sum())
            if seen >= self.tokens:
                return

    @cached_property
    def held_out(self) -> bool:
        """Whether every source of the text keeps a part from training, which is the one that is read."""
        return held_out_kept(self.data)

    @cached_property
    def skipped(self) -> Skipped:
        """Records of the text that were skipped; the first is reported."""
        return Skipped(lambda message: self.console.print(f"[yellow]{escape(message)}[/]", soft_wrap=True))

    @cached_property
    def activations(self) -> TextActivations:
        """Activations on the text, from the cache on disk where they are.

        Raises:
            ValueError: the text holds no real token.
        """
        rows = list(self.rows())
        key = {**self.model_key, "rows": rows_digest(rows)}
        found = self.cache.get("activations", key, lambda: self._collect(rows))
        return TextActivations(found["x"], found["ids"], found["row"], found["position"])

    def _collect(self, rows: list[Rows]) -> Tensors:
        parts: list[tuple[Tensor, ...]] = []
        first = 0
        with progress_bar(self.console) as bar:
            for part in bar.track(rows, description="activations"):
                row, position = part.real.nonzero(as_tuple=True)
                x_RTD = self.lm.activations(part.ids)
                parts.append((x_RTD[part.real.to(x_RTD.device)].cpu(), part.ids[part.real], first + row, position))
                first += len(part.ids)
        if not parts or sum(len(part[0]) for part in parts) == 0:
            raise ValueError("data: the evaluation's text holds no token besides BOS, EOS and padding")
        x, ids, row, position = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return {"x": x, "ids": ids, "row": row, "position": position}


@dataclass(frozen=True)
class Setting:
    """What an evaluation that needs no language model of ours gets in place of a bench."""

    tokens: int
    seed: int
    console: Console
    device: torch.device
    cache: Cache
    model: str | None = None
    """Name of the language model that replaces the one in each SAE's file."""


def rows_digest(batches: Sequence[Rows]) -> str:
    """What activations of rows depend on besides the model, and which positions of them are real."""
    digest = hashlib.sha256()
    for part in batches:
        digest.update(f"{tuple(part.ids.shape)}".encode() + part.ids.numpy().tobytes() + part.real.numpy().tobytes())
    return digest.hexdigest()


Place = TypeVar("Place", Bench, Setting)
Evaluation = Callable[[Bench, dict[str, SAE]], Iterator[Outcome]]
"""Yields each SAE's outcome as soon as it is there, so that it can be written before the next one fails."""
ModelFree = Callable[[Setting, dict[str, SAE]], Iterator[Outcome]]
"""The same for an evaluation that reads SAEs, and data that their own folders name, without a language model."""


def each(
    evaluation: str, one: Callable[[Place, str, SAE], Outcome]
) -> Callable[[Place, dict[str, SAE]], Iterator[Outcome]]:
    """An evaluation that takes SAEs one by one; the failure of one is its outcome and stops no other."""

    def run(bench: Place, saes: dict[str, SAE]) -> Iterator[Outcome]:
        for name, sae in saes.items():
            try:
                outcome = one(bench, name, sae)
            except FAILURES as error:
                outcome = failure(name, evaluation, error)
            yield outcome

    return run


def failure(name: str, evaluation: str, error: Exception) -> Outcome:
    """The outcome of an evaluation that raised `error`."""
    return Outcome(name, evaluation, error=f"{type(error).__name__}: {error}")
