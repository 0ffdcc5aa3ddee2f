"""Readers of documents for the configured sources, in an order fixed by the seed, starting at any position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from c2r.config.text import DataConfig, TextSource
from c2r.identity import of_files
from c2r.text.document import Document, Read, Reader
from c2r.text.files import FileReader
from c2r.text.held_out import HeldOut
from c2r.text.hub import DataSetReader
from c2r.text.pieces import Cuts
from c2r.text.spelling import spelling_lists
from c2r.text.stdlib import stdlib_part, stdlib_sources

Shard = tuple[int, int]
"""(index, count): document n of a pass belongs to shard n mod count."""
STREAM_WINDOW = 1000


class StdlibReader:
    """Documents of the standard library's files: with `held_out` those never trained on, otherwise all others."""

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out

    def identity(self) -> str:
        """Digest of the files' contents, which depend on the Python version."""
        return f"stdlib, {'held-out' if self.held_out else 'training'} part: {of_files(stdlib_part(self.held_out))}"

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`; a position is the number of files read."""
        for number, (name, text) in enumerate(stdlib_sources(seed, self.held_out, start or 0), start or 0):
            if text.strip():
                yield Document("text", text, None, name), partial(int, number + 1)


class ShuffledDocuments:
    """Another reader's documents, shuffled by the seed within windows of `size`.

    A position is the reader's position at the window's start, the window's number, the number of its documents already
    served and, within a document, of pieces already served. Resuming therefore reads at most one window again.
    """

    def __init__(self, reader: Reader, size: int) -> None:
        self.reader, self.size = reader, size

    def identity(self) -> str:
        """The reader's identity and the window size."""
        return f"{self.reader.identity()}, windows of {self.size}"

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`."""
        at, number, served, done = _window_position(start)
        source = self.reader.read(seed, at)
        while True:
            window: list[list[Document]] = []
            after = None
            for document, position in source:
                if document.before:
                    window[-1].append(document)
                else:
                    window.append([document])
                if len(window) == self.size and not document.more:
                    after = position()
                    break
            if not window:
                return
            random.Random(f"{seed} {number}").shuffle(window)
            for place, pieces in enumerate(window[served:], served):
                for piece, document in enumerate(pieces[done:], done + 1):
                    yield (
                        document,
                        partial(list, (at, number, place, piece) if document.more else (at, number, place + 1)),
                    )
                done = 0
            at, number, served = after, number + 1, 0


def _window_position(start: Any) -> tuple[Any, int, int, int]:
    """Position of the window's start, its number, documents already served, and pieces of the next one served."""
    at, number, served, *pieces = start or (None, 0, 0)
    return at, number, served, pieces[0] if pieces else 0


class SpellingLists:
    """Endless spelling lists; see `spelling_lists` for their positions."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def identity(self) -> str:
        """Spelling lists depend on the tokenizer, whose identity is recorded on its own."""
        return "spelling lists"

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`."""
        for text, position in spelling_lists(self.words, seed, start):
            yield Document("text", text), partial(list, position)


def open_reader(
    section: str,
    source: TextSource,
    held_out: bool = False,
    cuts: Cuts | None = None,
    kept: bool | None = None,
) -> Reader:
    """Open the reader of a single source (not a mixture).

    Arguments:
        section: section of the configuration that defines the source, for errors.
        source: the source.
        held_out: read the text held out from training, for evaluation: of `stdlib`, files on which the embedded model
            was not trained either; of other sources, the share `held_out`. `held_out_kept` tells whether there is any.
        cuts: where long text may be cut into pieces; None: nowhere.
        kept: whether the source holds out a part from training, if known; None: find out.

    Raises:
        ValueError: files are missing.
    """
    if source.source == "stdlib":
        return StdlibReader(held_out)
    reader = _split(section, source, held_out, cuts)
    if kept is not None:
        reader.kept = kept
    window = source.shuffle_documents or (STREAM_WINDOW if source.source == "hf" and source.streaming else 1)
    return reader if window == 1 else ShuffledDocuments(reader, window)


def _split(section: str, source: TextSource, held_out: bool, cuts: Cuts | None = None) -> HeldOut:
    """The reader of files or a data set, restricted to the held-out part or the rest."""
    if source.source == "hf":
        return HeldOut(DataSetReader(section, source), source.held_out, held_out)
    files = FileReader(section, source, cuts)
    return HeldOut(files, source.held_out, held_out, files.openings)


def keeps_part(reader: Reader) -> bool:
    """Whether a reader's source holds out a part from training.

    Raises:
        ValueError: the source cannot be read.
    """
    reader = reader.reader if isinstance(reader, ShuffledDocuments) else reader
    return reader.kept if isinstance(reader, HeldOut) else True


def held_out_kept(config: DataConfig) -> bool:
    """Whether all sources hold out a part from training, which `packed_rows(..., held_out=True)` reads.

    Raises:
        ValueError: a source cannot be read.
    """
    return all(keeps_part(open_reader(section, source)) for section, source in config.sections.items())


def read_shard(reader: Reader, seed: int, shard: Shard = (0, 1), start: Any = None) -> Iterator[tuple[Document, Any]]:
    """The documents of a pass that belong to a shard, each with the position after it.

    A position is the number of documents read, including those of other shards, and the reader's position.
    """
    index, count = shard
    number, at = start or (0, None)
    for document, position in reader.read(seed, at):
        mine = number % count == index
        number += 0 if document.more else 1
        if mine:
            yield document, [number, position()]


def check_source(config: DataConfig) -> None:
    """Check every source before a model is loaded.

    Raises:
        ValueError: files are missing, or all documents of a source are empty or all its records bad.
    """
    for section, source in config.sections.items():
        if source.source == "stdlib":
            found = (document for document, _ in StdlibReader(False).read(0))
        elif source.source == "hf":
            found = (document for document, _ in DataSetReader(section, source).read(0))
        else:
            found = FileReader(section, source).openings()
        bad = None
        for document in found:
            if document.form != "bad":
                break
            bad = bad or document.content
        else:
            raise ValueError(
                no_text(section, source) + (f"; all records were skipped; the first error: {bad}" if bad else "")
            )


def no_text(section: str, source: TextSource) -> str:
    """The message for a source without text."""
    return f"{section}.{'path' if source.path else 'source'}: {source.path or source.source} holds no text"
