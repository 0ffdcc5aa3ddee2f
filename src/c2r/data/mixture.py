"""Encoded documents of several sources and of spelling lists in turn, by their shares of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from c2r.data.document import Reader
from c2r.data.encode import Encoded, Encoder
from c2r.data.sources import Shard, no_text, read_shard
from c2r.data_config import MixturePart, TextSource

Position = dict[str, Any]
PART_START = (0, None, False)
MIXER_START: Position = {"tokens": [], "spelled": 0, "lists": None}


class Part:
    """The encoded documents of one source, pass after pass.

    `state`, the position before the next document: passes made, position in the present one, and whether that had a
    real token so far.
    """

    def __init__(
        self,
        section: str,
        source: TextSource,
        reader: Reader,
        encoder: Encoder,
        seed: int,
        shard: Shard,
        state: Sequence[Any],
    ) -> None:
        self.section, self.source, self.reader, self.encoder = section, source, reader, encoder
        self.seed, self.shard = seed, shard
        self.weight = source.weight if isinstance(source, MixturePart) else 1.0
        self.passes, self._at, self._real = state
        self._documents: Iterator[tuple[Encoded, Any]] | None = None

    @property
    def state(self) -> list[Any]:
        """Where the part goes on."""
        return [self.passes, self._at, self._real]

    def next(self) -> Encoded | None:
        """The next document; None where a pass ends."""
        if self._documents is None:
            documents = read_shard(self.reader, self.seed + self.passes, self.shard, self._at)
            self._documents = self.encoder.encoded(documents)
        found = next(self._documents, None)
        if found is not None:
            encoded, self._at = found
            self._real = self._real or bool(encoded.real.any())
            return encoded
        if not self._real:  # also if every token is special: rows without end would hold nothing to learn from
            of = "" if self.shard[1] == 1 else f" in shard {self.shard[0]} of {self.shard[1]}"
            raise ValueError(f"{no_text(self.section, self.source)}{of}; nothing to train on")
        self.passes, self._at, self._real, self._documents = self.passes + 1, None, False, None
        return None


class Mixer:
    """Documents of all parts and spelling lists in turn, so that shares of tokens are kept as closely as can be."""

    def __init__(
        self, parts: list[Part], lists: Iterator[tuple[Encoded, Any]] | None, share: float, at: Position
    ) -> None:
        self.parts, self.lists, self.share = parts, lists, share
        self.tokens, self.spelled, self._lists_at = list(at["tokens"]) or [0] * len(parts), at["spelled"], at["lists"]

    def reset(self) -> None:
        """Count shares from here on."""
        self.tokens, self.spelled = [0] * len(self.parts), 0

    def until(self, last: int | None) -> Iterator[tuple[Position, Encoded]]:
        """Documents until every part has made `last` passes (None: without end), with the position before each."""
        while True:
            before = {
                "parts": [part.state for part in self.parts],
                "tokens": list(self.tokens),
                "spelled": self.spelled,
                "lists": self._lists_at,
            }
            if self.lists is not None and self.spelled < self.share * (sum(self.tokens) + self.spelled):
                encoded, self._lists_at = next(self.lists)
                self.spelled += len(encoded.ids)
            else:
                # The part that is furthest behind its share.
                number = min(range(len(self.parts)), key=lambda i: self.tokens[i] / self.parts[i].weight)
                encoded = self.parts[number].next()
                if encoded is None:
                    if last is not None and all(part.passes >= last for part in self.parts):
                        return
                    continue
                self.tokens[number] += len(encoded.ids)
            yield before, encoded
