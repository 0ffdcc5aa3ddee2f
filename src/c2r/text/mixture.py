"""Interleave encoded documents of several sources and spelling lists so that each gets its share of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from c2r.config.text import MixturePart, TextSource
from c2r.text.document import Reader
from c2r.text.sources import Shard, no_text, read_shard
from c2r.text.tokenizing import Encoder, Tokenized

Position = dict[str, Any]
PART_START = (0, None, False, 0)
MIXER_START: Position = {"tokens": [], "spelled": 0, "lists": None, "open": None}


class Skipped:
    """Count of the records skipped because they cannot be used (`bad_records: skip`), over all passes.

    A resumed reader continues from the count stored in its position, so no record is counted twice.

    Arguments:
        say: called once, with a message about the first skipped record.
    """

    def __init__(self, say: Callable[[str], Any] | None = None) -> None:
        self.say, self._said = say, False
        self.parts: list[MixedSource] = []

    @property
    def count(self) -> int:
        """Number of records skipped, including those in text that was read ahead."""
        return sum(part.skipped for part in self.parts)

    @property
    def report(self) -> str | None:
        """The count as a line for the console; None if nothing was skipped."""
        return f"bad records skipped: {self.count:,}" if self.count else None

    def add(self, message: str) -> None:
        """Report a skipped record if it is the first."""
        if self.say is not None and not self._said:
            self._said = True
            self.say(f"skipped a bad record: {message}; further bad records are only counted")


class MixedSource:
    """The encoded documents of one source, pass after pass.

    `state` is the position before the next document: completed passes, position in the current pass, whether that pass
    has had a real token so far, and records skipped in all passes.
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
        self.passes, self._at, self._real, self.skipped = (*state, 0)[:4]  # old positions have three entries
        self._skipped = skipped or Skipped()
        self._documents: Iterator[tuple[Tokenized, Any]] | None = None

    @property
    def state(self) -> list[Any]:
        """Position from which the part continues."""
        return [self.passes, self._at, self._real, self.skipped]

    def next(self) -> Tokenized | None:
        """The next document, or the next piece of one; None at the end of a pass.

        Raises:
            ValueError: a bad record with `bad_records: error`, or a pass without any real token.
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
        if not self._real:  # also if every token is special: otherwise passes would repeat forever without data
            of = "" if self.shard[1] == 1 else f" in shard {self.shard[0]} of {self.shard[1]}"
            bad = f"; {self.skipped:,} records were skipped" if self.skipped else ""
            raise ValueError(f"{no_text(self.section, self.source)}{of}; nothing to train on{bad}")
        self.passes, self._at, self._real, self._documents = self.passes + 1, None, False, None
        return None


class Mixer:
    """Interleaves the documents of all parts and the spelling lists, keeping to their token shares as closely as
    possible.
    """

    def __init__(
        self, parts: list[MixedSource], lists: Iterator[tuple[Tokenized, Any]] | None, share: float, at: Position
    ) -> None:
        self.parts, self.lists, self.share = parts, lists, share
        self.tokens, self.spelled, self._lists_at = list(at["tokens"]) or [0] * len(parts), at["spelled"], at["lists"]
        self._open: int | None = at.get("open")
        """Index of the part whose current document has more pieces; they are served without interruption."""

    def reset(self) -> None:
        """Restart the counts from which shares are computed."""
        self.tokens, self.spelled = [0] * len(self.parts), 0

    def until(self, last: int | None) -> Iterator[tuple[Position, Tokenized]]:
        """Documents until every part has completed `last` passes (None: forever), each with the position before it."""
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
