"""Read activations in the order of the text, by running a language model on packed rows, and measure the first ones.

R rows · T positions in a row · n tokens of a part · m selected tokens · D width of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from c2r.activations.counting import counting_rules, counts_at_all
from c2r.activations.look import Decode, look_at, none_known
from c2r.config.hooks import HookPoint
from c2r.config.run import RunConfig, StreamConfig
from c2r.config.text import DataConfig
from c2r.language_model.model import LanguageModel
from c2r.text.packing import Rows, Skipped, packed_rows
from c2r.text.shuffle import shuffled_rows

CALIBRATION_TOKENS = 65_536


@dataclass(frozen=True)
class Part:
    """Activations of the real tokens of some rows, in the order of the text, on the CPU."""

    x: dict[HookPoint, Tensor]
    """Activations `[n, D]` of the same tokens at each hook point, in the model's or the cache's precision; contiguous
    rows."""
    norms: dict[HookPoint, Tensor]
    """Their norms, fp32 `[n]`."""
    ids: Tensor
    """Token ids, int32 `[n]`."""
    where: Tensor
    """Int32 `[n, 2]`: index of the row, counted from the first row read, and position in it."""
    position: Any
    """The reader's position before this part, JSON-serializable; None: the beginning."""

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, keep_n: Tensor) -> Part:
        """The tokens selected by a mask, as a part at the same position."""
        x, norms = ({point: y[keep_n] for point, y in tensors.items()} for tensors in (self.x, self.norms))
        return Part(x, norms, self.ids[keep_n], self.where[keep_n], self.position)


@runtime_checkable
class ActivationReader(Protocol):
    """Source of parts: `LiveReader` runs the model, `CacheReader` reads a cache written by it."""

    def read(self, start: Any = None) -> Iterator[Part]:
        """Parts from the beginning or, given an earlier part's `position`, from that part on, bit-identical."""
        ...


class BrokenActivations(ValueError):
    """The model emitted NaN or infinity. `tensors` holds the part: `ids`, `where`, activations by hook point's name."""

    def __init__(self, message: str, tensors: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.tensors = tensors


class LiveReader:
    """A language model's activations at some hook points over packed rows.

    Arguments:
        lm: the language model.
        points: hook points, all read in one forward pass.
        rows: returns rows from a position, or from the beginning (None), like `shuffled_rows`.
        dtype: precision to which activations are rounded; None: that of the model.
        skipped: counts the records of the text that are skipped.
    """

    def __init__(
        self,
        lm: LanguageModel,
        points: Sequence[HookPoint],
        rows: Callable[[Any], Iterator[Rows]],
        dtype: torch.dtype | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        self.lm, self.points, self.rows, self.dtype = lm, points, rows, dtype
        self.skipped = skipped or Skipped()

    def decode(self, token: int) -> str:
        """The text of a token."""
        return self.lm.tokenizer.decode([token])

    def read(self, start: Any = None) -> Iterator[Part]:
        """See `ActivationReader`.

        Raises:
            BrokenActivations: the model emits NaN or infinity.
            ValueError: an error of the text's source.
        """
        number = 0 if start is None else start["row"]
        for rows in self.rows(None if start is None else start["text"]):
            real_RT = rows.real.to(self.lm.device)
            x = {
                point: x_RTD[real_RT].to(self.dtype or x_RTD.dtype)
                for point, x_RTD in self.lm.activations_at(rows.ids, self.points).items()
            }
            norms = {point: torch.linalg.vector_norm(x_nD, dim=1, dtype=torch.float32) for point, x_nD in x.items()}
            where = rows.real.nonzero()
            where[:, 0] += number
            part = Part(
                {point: x[point].cpu() for point in self.points},
                {point: norms[point].cpu() for point in self.points},
                rows.ids[rows.real].int(),
                where.int(),
                {"row": number, "text": rows.position},
            )
            _check_finite(part)
            if len(part):
                yield part
            number += len(rows.ids)


def live_reader(config: RunConfig, lm: LanguageModel, dtype: torch.dtype | None = None) -> LiveReader:
    """The reader for a configuration: endless passes over the text, each in a different order, with rows shuffled.

    Raises:
        ValueError: a hook point does not exist, or rows are too long for the model; the message names the field.
    """
    data = config.data
    assert isinstance(data, DataConfig)
    for sae in config.saes:
        try:
            lm.check_points([config.point(sae)])
        except ValueError as error:
            raise ValueError(f"saes.{sae.name}: {error}") from error
    lm.check_data(data, config.model.name)
    settings: dict[str, Any] = {"seed": config.seed, "rows": config.stream.model_rows}
    skipped = Skipped()
    more: dict[str, Any] = {"epochs": None, "skipped": skipped, "embeddings": lm.embeddings}

    def in_order(start: Any) -> Iterator[Rows]:
        return packed_rows(data, lm.tokenizer, **settings, **more, start=start)

    shuffled = shuffled_rows(in_order, config.stream.text_window_tokens, **settings)
    return LiveReader(lm, config.points, shuffled, dtype, skipped)


def _check_finite(part: Part) -> None:
    """Reject NaN or infinite activations. Checking the norms suffices: they sum over every coordinate."""
    for point, norms_n in part.norms.items():
        bad_n = ~norms_n.isfinite()
        if bad_n.any():
            first = int(bad_n.nonzero()[0])
            row, place = part.where[first].tolist()
            raise BrokenActivations(
                f"model: activations at {point.name} are not finite (NaN or infinity) for {int(bad_n.sum())} of "
                f"{len(part)} tokens, first in row {row}, position {place}, token {int(part.ids[first])}; "
                "try model.dtype: float32",
                {p.name: x_nD for p, x_nD in part.x.items()} | {"ids": part.ids, "where": part.where},
            )


class Measured(NamedTuple):
    """Statistics of the first tokens, by hook point."""

    median_norm: dict[HookPoint, float]
    scale: dict[HookPoint, float]
    """√(mean ‖x‖²) over the tokens kept."""
    look: Mapping[HookPoint, dict[str, Any]] = MappingProxyType({})
    """A `c2r.activations.look.Look` per hook point, JSON-serializable."""


def measure(parts: Sequence[Part], tokens: int, config: StreamConfig, decode: Decode = none_known) -> Measured:
    """Measure median norm, scale and `Look` at each hook point over the first `tokens` tokens of `parts`.

    Raises:
        ValueError: there is no token, or all activations are zero.
    """
    if not parts:
        raise ValueError("data: the text holds no tokens other than BOS, EOS and padding")
    norms = {point: torch.cat([part.norms[point] for part in parts])[:tokens] for point in parts[0].x}
    median = {point: norms_n.median().item() for point, norms_n in norms.items()}
    keep_n = usual(norms, median, config)
    scale = {point: norms_n[keep_n].square().mean().sqrt().item() for point, norms_n in norms.items()}
    for point, value in scale.items():
        if not 0 < value < float("inf"):
            raise ValueError(
                f"model: activations at {point.name} have root mean square norm {value}, so they cannot be scaled"
            )
    ids_n = torch.cat([part.ids for part in parts])[:tokens]
    look = {
        point: look_at(norms_n, keep_n, ids_n, partial(_rows_of, parts, point), decode)._asdict()
        for point, norms_n in norms.items()
    }
    return Measured(median, scale, look)


def _rows_of(parts: Sequence[Part], point: HookPoint, place_m: Tensor) -> Tensor:
    """Activations `[m, D]` of the tokens at these indices, which are ascending and count over all parts."""
    found, begin = [], 0
    for part in parts:
        mine_m = (place_m >= begin) & (place_m < begin + len(part))
        found.append(part.x[point][place_m[mine_m] - begin])
        begin += len(part)
    return torch.cat(found)


def check_kept(read: int, kept: int, config: StreamConfig) -> None:
    """Stop the search for tokens to keep if nearly all are outliers.

    Raises:
        ValueError: of the last 65,536 tokens or more, fewer than one in a hundred is kept.
    """
    if read >= CALIBRATION_TOKENS and kept * 100 < read:
        raise ValueError(
            f"stream.max_norm_multiple: got {config.max_norm_multiple}, but {read - kept:,} of the last {read:,} "
            "tokens are outliers: their norms exceed that multiple of the median norm of the first tokens. Has the "
            "model changed since then? null keeps all tokens"
        )


def usual(norms: dict[HookPoint, Tensor], median: dict[HookPoint, float], config: StreamConfig) -> Tensor:
    """Bool `[n]`: tokens that are not an outlier at any hook point, so that all SAEs see the same tokens."""
    return counts_at_all(counting_rules(median, config.max_norm_multiple), norms)
