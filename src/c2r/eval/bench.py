"""What the evaluations of one call share: settings, language model, text and its activations, and a cache on disk.

n real tokens · D width of the activations · R rows · T positions.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from c2r.config.evaluations import EvaluationConfig
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.disk_cache import Cache, Tensors
from c2r.eval.outcome import Outcome
from c2r.language_model.model import LanguageModel
from c2r.progress import progress_bar
from c2r.sae.model import SAE
from c2r.text.packing import Rows, Skipped, held_out_kept, packed_rows

_POSITIONS = 4096
"""Largest number of positions per forward pass, so that a model's hidden states stay small."""


class TextActivations(NamedTuple):
    """The hook point's activations on the evaluation's text: real tokens only, in order."""

    x_nD: Tensor
    ids_n: Tensor
    row_n: Tensor
    """Row of the text that each token is in."""
    position_n: Tensor
    """Its position in that row."""


class Reading(NamedTuple):
    """One language model at one hook point, and one text."""

    lm: LanguageModel
    model: ModelConfig
    data: DataConfig


@dataclass
class Bench:
    """The context of all evaluations of one call."""

    config: EvaluationConfig
    cache: Cache
    console: Console
    device: torch.device
    reading: Reading | None = None
    """None if only evaluations run that need no language model."""
    counted: dict[str, Any] = field(default_factory=dict)
    """What `c2r.eval.counted.counted` found, by SAE."""

    @property
    def lm(self) -> LanguageModel:
        """The language model."""
        assert self.reading is not None
        return self.reading.lm

    @property
    def model(self) -> ModelConfig:
        """Its section of the configuration."""
        assert self.reading is not None
        return self.reading.model

    @property
    def data(self) -> DataConfig:
        """The text."""
        assert self.reading is not None
        return self.reading.data

    @property
    def model_key(self) -> dict[str, Any]:
        """What activations of this model at this hook point depend on."""
        from transformers import __version__ as transformers_version

        return {"model": self.model.model_dump(mode="json"), "identity": self.lm.identity, "lib": transformers_version}

    @contextlib.contextmanager
    def lm_on_cpu(self) -> Iterator[None]:
        """Move the language model to the CPU while another one needs the device's memory."""
        if self.reading is None:
            yield
            return
        device = self.lm.device
        self.lm.model.to("cpu")
        try:
            yield
        finally:
            self.lm.model.to(device)

    def rows(self) -> Iterator[Rows]:
        """The held-out text in batches of rows, until `tokens` real tokens have passed."""
        size = max(1, min(16, _POSITIONS // self.data.context))
        seen = 0
        settings: dict[str, Any] = {"seed": self.config.seed, "held_out": True, "rows": size, "skipped": self.skipped}
        settings["embeddings"] = self.lm.embeddings
        for part in packed_rows(self.data, self.lm.tokenizer, **settings):
            yield part
            seen += int(part.real.sum())
            if seen >= self.config.tokens:
                return

    @cached_property
    def held_out(self) -> bool:
        """Whether every source of the text has a part that training never reads; if so, that part is read."""
        return held_out_kept(self.data)

    @cached_property
    def skipped(self) -> Skipped:
        """Records of the text that were skipped; the first one is reported."""
        return Skipped(lambda message: self.console.print(f"[yellow]{escape(message)}[/]", soft_wrap=True))

    @cached_property
    def activations(self) -> TextActivations:
        """Activations on the text, from the cache on disk if they are there.

        Raises:
            ValueError: the text contains no real token.
        """
        rows = list(self.rows())
        found = self.read(rows, "activations")
        if len(found["x"]) == 0:
            raise ValueError("data: the evaluation's text holds no token besides BOS, EOS and padding")
        return TextActivations(found["x"], found["ids"], found["row"], found["position"])

    def read(self, batches: Sequence[Rows], kind: str, description: str = "activations") -> Tensors:
        """Activations of all real tokens of some rows, from the cache on disk if they are there.

        Returns:
            x `[n, D]`; and of each token ids, row and position `[n]`.
        """
        key = {**self.model_key, "rows": rows_digest(batches)}
        return self.cache.get(kind, key, lambda: self._read(batches, description))

    def _read(self, batches: Sequence[Rows], description: str) -> Tensors:
        empty_n = torch.empty(0, dtype=torch.long)
        parts: list[tuple[Tensor, ...]] = [(torch.empty(0, self.lm.d_in), empty_n, empty_n, empty_n)]
        first = 0
        with progress_bar(self.console) as bar:
            for part in bar.track(batches, description=description):
                row_n, position_n = part.real.nonzero(as_tuple=True)
                x_RTD = self.lm.activations(part.ids)
                x_nD = x_RTD[part.real.to(x_RTD.device)].cpu()
                parts.append((x_nD, part.ids[part.real], first + row_n, position_n))
                first += len(part.ids)
        x_nD, ids_n, row_n, position_n = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return {"x": x_nD, "ids": ids_n, "row": row_n, "position": position_n}


def rows_digest(batches: Sequence[Rows]) -> str:
    """Digest of what activations of rows depend on besides the model, and of which positions are real."""
    digest = hashlib.sha256()
    for part in batches:
        digest.update(f"{tuple(part.ids.shape)}".encode() + part.ids.numpy().tobytes() + part.real.numpy().tobytes())
    return digest.hexdigest()


Evaluation = Callable[[Bench, dict[str, SAE]], Iterator[Outcome]]
"""Yields each SAE's outcome as soon as it is known, so that it can be written before the next one fails."""
