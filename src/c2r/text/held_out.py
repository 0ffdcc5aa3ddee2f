"""A share of a source's documents that training leaves to evaluations, chosen by what is in them."""

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
"""Distinct documents that each part must have; otherwise both are the whole source."""


class HeldOut:
    """One of the two parts of another reader's documents.

    Which part a document is in follows from its content (its first 65,536 characters) alone, so that neither the order
    nor the file it stands in matters, and copies of a document are in one part.

    Arguments:
        reader: of all documents.
        share: of the documents that training leaves out.
        held_out: the part to read: that share, or the rest.
        openings: gives all documents for a look at what they are; of long ones the beginning is enough.
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

    @property
    def identity(self) -> str:
        """The reader's, and the part."""
        part = f", {'the' if self.held_out else 'without the'} {self.share} held out" if self.kept else ""
        return f"{self.reader.identity}{part}"

    @cached_property
    def kept(self) -> bool:
        """Whether there are enough documents for two parts.

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
        """See `Reader`; positions are the reader's own."""
        mine = True  # a position within a document is in one of this part
        for document, position in self.reader.read(seed, start):
            if self.kept and not document.before and document.form != "bad":
                mine = (place_of(document) < self.share) == self.held_out
            if mine or document.form == "bad":
                yield document, position


def place_of(document: Document) -> float:
    """A number from 0 to 1 that follows from the document's content."""
    if document.form == "tokens":
        content = np.ascontiguousarray(document.content, np.int64).tobytes()
    elif document.form == "chat":
        content = json.dumps(document.content, sort_keys=True, default=str).encode()
    else:
        content = document.content[:PIECE].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
