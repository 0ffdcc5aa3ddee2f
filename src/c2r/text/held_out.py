"""Hold out a share of a source's documents from training, for evaluation; each document's content decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np

from c2r.text.document import Document, Read, Reader
from c2r.text.pieces import PIECE

LEAST = 4
"""Minimum number of distinct documents in each part; with fewer, the source is not split."""


class HeldOut:
    """The training part or the held-out part of another reader's documents.

    Only a document's content (its first 65,536 characters) decides its part. Order and file do not matter, and copies
    of a document end up in the same part.

    Arguments:
        reader: reads all documents.
        share: fraction of the documents held out from training.
        held_out: read the held-out part (true) or the rest (false).
        openings: returns all documents, to count them; for long ones the beginning is enough. None: use `reader`.
    """

    def __init__(
        self,
        reader: Reader,
        share: float,
        held_out: bool,
        openings: Callable[[], Iterable[Document]] | None = None,
    ) -> None:
        self.reader, self.share, self.held_out = reader, share, held_out
        self._openings = openings or (lambda: (document for document, _ in reader.read(0)))

    def identity(self) -> str:
        """The reader's identity and the part."""
        part = f", {'the' if self.held_out else 'without the'} {self.share} held out" if self.kept else ""
        return f"{self.reader.identity()}{part}"

    @cached_property
    def kept(self) -> bool:
        """Whether the source has enough documents to be split.

        Raises:
            ValueError: see `Reader.read`.
        """
        if self.share == 0:
            return False
        seen: tuple[set[float], set[float]] = set(), set()
        for document in self._openings():
            if document.form != "bad":
                place = place_of(document)
                seen[place < self.share].add(place)
                if min(map(len, seen)) >= LEAST:
                    return True
        return False

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`; positions are those of the underlying reader."""
        mine = True  # if `start` is inside a document, that document is in this part
        for document, position in self.reader.read(seed, start):
            if self.kept and not document.before and document.form != "bad":
                mine = (place_of(document) < self.share) == self.held_out
            if mine or document.form == "bad":
                yield document, position


def place_of(document: Document) -> float:
    """Hash of the document's content, as a number from 0 to 1."""
    if document.form == "tokens":
        content = np.ascontiguousarray(document.content, np.int64).tobytes()
    elif document.form == "chat":
        content = json.dumps(document.content, sort_keys=True, default=str).encode()
    else:
        content = document.content[:PIECE].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
