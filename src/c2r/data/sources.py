"""The configured sources as readers of documents, in an order fixed by the seed and from any position on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from c2r.config import DataConfig
from c2r.data.document import Document, Read, Reader
from c2r.data.files import FileReader
from c2r.data.hub import DataSetReader
from c2r.data.text import spelling_lists, stdlib_part, stdlib_sources
from c2r.data_config import TextSource
from c2r.identity import of_files

Shard = tuple[int, int]
"""Index and count: document n of a pass belongs to the shard n mod count."""
STREAM_WINDOW = 1000


class StdlibReader:
    """The standard library's files; `held_out` picks those that nothing was trained on, or all others."""

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out

    @property
    def identity(self) -> str:
        """The contents of the files, which follow the version of Python."""
        return f"stdlib, {'held-out' if self.held_out else 'training'} part: {of_files(stdlib_part(self.held_out))}"

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`; a position is the number of files read."""
        for number, (name, text) in enumerate(stdlib_sources(seed, self.held_out, start or 0), start or 0):
            if text.strip():
                yield Document("text", text, None, name), partial(int, number + 1)


class Windows:
    """Another reader's documents, shuffled by the seed within windows of `size`.

    A position is the reader's at the window's start, the window's number and how many documents of it were served, so
    that going on reads one window again and no more.
    """

    def __init__(self, reader: Reader, size: int) -> None:
        self.reader, self.size = reader, size

    @property
    def identity(self) -> str:
        """The reader's, and the size of windows."""
        return f"{self.reader.identity}, windows of {self.size}"

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`."""
        at, number, served = start or (None, 0, 0)
        source = self.reader.read(seed, at)
        while True:
            window: list[Document] = []
            after = None
            for document, position in source:
                window.append(document)
                if len(window) == self.size:
                    after = position()
                    break
            if not window:
                return
            random.Random(f"{seed} {number}").shuffle(window)
            for place, document in enumerate(window[served:], served + 1):
                yield document, partial(list, (at, number, place))
            at, number, served = after, number + 1, 0


class SpellingLists:
    """Spelling lists without end; see `spelling_lists` for their positions."""

    identity = "spelling lists"

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`."""
        for text, position in spelling_lists(self.words, seed, start):
            yield Document("text", text), partial(list, position)


def open_reader(section: str, source: TextSource, held_out: bool = False) -> Reader:
    """The reader of one source (no mixture).

    `held_out` asks for text to evaluate on: for `stdlib` the files that neither the embedded model nor an SAE is
    trained on. Other sources have no such part: it is the same text, and the caller has to say so.

    Raises:
        ValueError: missing files.
    """
    if source.source == "stdlib":
        return StdlibReader(held_out)
    streamed = source.source == "hf" and source.streaming
    reader = DataSetReader(section, source) if source.source == "hf" else FileReader(section, source)
    window = source.shuffle_documents or (STREAM_WINDOW if streamed else 1)
    return reader if window == 1 else Windows(reader, window)


def read_shard(reader: Reader, seed: int, shard: Shard = (0, 1), start: Any = None) -> Iterator[tuple[Document, Any]]:
    """The documents of a pass that belong to a shard, each with the position after it.

    A position is the number of documents read, those of other shards counted, and the reader's own position.
    """
    index, count = shard
    first, at = start or (0, None)
    for number, (document, position) in enumerate(reader.read(seed, at), first):
        if number % count == index:
            yield document, [number + 1, position()]


def check_source(config: DataConfig) -> None:
    """Find what is wrong with the source before a model is loaded.

    Raises:
        ValueError: missing files, or a source whose every document is empty.
    """
    for section, source in config.sections.items():
        if next(open_reader(section, source).read(0), None) is None:
            raise ValueError(no_text(section, source))


def no_text(section: str, source: TextSource) -> str:
    """The message for a source without text."""
    return f"{section}.{'path' if source.path else 'source'}: {source.path or source.source} holds no text"
