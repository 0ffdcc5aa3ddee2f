"""Encoded documents of several sources and of spelling lists in turn, by their shares of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from c2r.config.text import MixturePart, TextSource
from c2r.text.document import Reader
from c2r.text.sources import Shard, no_text, read_shard
from c2r.text.tokenizing import Encoded, Encoder

Position = dict[str, Any]
PART_START = (0, None, False, 0)
MIXER_START: Position = {"tokens": [], "spelled": 0, "lists": None, "open": None}


class Skipped:
    """Records that were skipped because they cannot be used (`bad_records: skip`), counted over all passes.

    Resumed, a reader goes on from the count at its position, so that none is counted twice.

    Arguments:
        say: is given the first one's message as soon as it is met.
    """

    def __init__(self, say: Callable[[str], Any] | None = None) -> None:
        self.say, self._said = say, False
        self.parts: list[Part] = []

    @property
    def count(self) -> int:
        """How many, read ahead ones included."""
        return sum(part.skipped for part in self.parts)

    @property
    def report(self) -> str | None:
        """The count in a sentence; None where nothing was skipped."""
        return f"bad records of the text that were skipped: {self.count:,}" if self.count else None

    def add(self, message: str) -> None:
        """Report one, if it is the first."""
        if self.say is not None and not self._said:
            self._said = True
            self.say(f"skipped a bad record: {message}; further ones are counted")


class Part:
    """The encoded documents of one source, pass after pass.

    `state`, the position before the next document: passes made, position in the present one, whether that had a real
    token so far, and records skipped in all passes.
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
        skipped: Skipped | None = None,
    ) -> None:
        self.section, self.source, self.reader, self.encoder = section, source, reader, encoder
        self.seed, self.shard = seed, shard
        self.weight = source.weight if isinstance(source, MixturePart) else 1.0
        self.passes, self._at, self._real, self.skipped = (*state, 0)[:4]  # positions of before have three
        self._skipped = skipped or Skipped()
        self._documents: Iterator[tuple[Encoded, Any]] | None = None

    @property
    def state(self) -> list[Any]:
        """Where the part goes on."""
        return [self.passes, self._at, self._real, self.skipped]

    def next(self) -> Encoded | None:
        """The next document, or the next piece of one; None where a pass ends.

        Raises:
            ValueError: a bad record that is not to be skipped, or a pass without a real token.
        """
        if self._documents is None:
            documents = read_shard(self.reader, self.seed + self.passes, self.shard, self._at)
            self._documents = self.encoder.encoded(documents)
        for encoded, position in self._documents:
            self._at = position
            if encoded.bad is None:
                self._real = self._real or bool(encoded.real.any())
                return encoded
            if self.source.bad_records == "error":
                raise ValueError(encoded.bad)
            self.skipped += 1
            self._skipped.add(encoded.bad)
        if not self._real:  # also if every token is special: rows without end would hold nothing to learn from
            of = "" if self.shard[1] == 1 else f" in shard {self.shard[0]} of {self.shard[1]}"
            bad = f"; {self.skipped:,} records were skipped" if self.skipped else ""
            raise ValueError(f"{no_text(self.section, self.source)}{of}; nothing to train on{bad}")
        self.passes, self._at, self._real, self._documents = self.passes + 1, None, False, None
        return None


class Mixer:
    """Documents of all parts and spelling lists in turn, so that shares of tokens are kept as closely as can be."""

    def __init__(
        self, parts: list[Part], lists: Iterator[tuple[Encoded, Any]] | None, share: float, at: Position
    ) -> None:
        self.parts, self.lists, self.share = parts, lists, share
        self.tokens, self.spelled, self._lists_at = list(at["tokens"]) or [0] * len(parts), at["spelled"], at["lists"]
        self._open: int | None = at.get("open")
        """The part whose document is not at its end; nothing comes in between its pieces."""

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
                "open": self._open,
            }
            due = self.spelled < self.share * (sum(self.tokens) + self.spelled)
            if self.lists is not None and due and self._open is None:
                encoded, self._lists_at = next(self.lists)
                self.spelled += len(encoded.ids)
            else:
                # The part that is furthest behind its share.
                number = self._open
                if number is None:
                    number = min(range(len(self.parts)), key=lambda i: self.tokens[i] / self.parts[i].weight)
                encoded = self.parts[number].next()
                if encoded is None:
                    if last is not None and all(part.passes >= last for part in self.parts):
                        return
                    continue
                self.tokens[number] += len(encoded.ids)
                self._open = number if encoded.more else None
            yield before, encoded
