"""Documents of local files, read from any position: text, JSON lines (optionally compressed) and Parquet."""

from __future__ import annotations

import gzip
import json
import random
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from c2r.config.text import TextSource
from c2r.identity import of_files
from c2r.text.decoding import HEAD, Codec, byte_lines, codec_of, fault_in, open_text, undecodable
from c2r.text.document import BadRecord, Document, Read, as_document, fields_of
from c2r.text.paths import ending, file_paths
from c2r.text.pieces import PIECE, Cuts, pieces

__all__ = ["FileReader", "file_paths", "jsonl_records", "parquet_records", "zstd_module"]


class FileReader:
    """Documents of local files: a `.txt` file is one document (in pieces if long), others hold one per line or row.

    The seed shuffles the files; within a file, documents keep their order.

    Arguments:
        section: section of the configuration that defines the source, for errors.
        source: the source.
        cuts: where long text may be cut; None: nowhere.

    Raises:
        ValueError: see `file_paths`; or text files although the source reads fields.
    """

    def __init__(self, section: str, source: TextSource, cuts: Cuts | None = None) -> None:
        self.section, self.source, self.cuts = section, source, cuts
        self.paths = file_paths(source.path or "", section)
        plain = next((path for path in self.paths if ending(path) == ".txt"), None)
        if plain is not None and (source.chat_field or source.tokens_field):
            raise ValueError(f"{section}.path: {plain} is plain text, without fields; give .jsonl or .parquet files")

    def identity(self) -> str:
        """Digest of the files' contents in order; see `of_files` for how much of very large files is read.

        Raises:
            ValueError: a file cannot be read.
        """
        try:
            return of_files(self.paths)
        except ValueError as error:
            raise ValueError(f"{self.section}.path: {error}") from error

    def read(self, seed: int, start: Any = None) -> Read:
        """See `Reader`.

        A position is the index of the file, the number of its lines or rows already read, and the bytes in those lines
        (within a text file: the characters already read).
        """
        paths = list(self.paths)
        random.Random(seed).shuffle(paths)
        first, done, at = start or (0, 0, 0)
        for number, path in enumerate(paths[first:], first):
            if ending(path) != ".txt":
                for document, after in self._records(path, done, at):
                    yield document, partial(list, (number, *after))
            elif not done:
                for document, characters in self._text(path, at):
                    yield document, partial(list, (number, 0, characters) if document.more else (number, 1, 0))
            done = at = 0

    def openings(self) -> Iterator[Document]:
        """The documents in the order of seed 0; of each text file only its beginning, one piece long."""
        paths = list(self.paths)
        random.Random(0).shuffle(paths)
        for path in paths:
            if ending(path) == ".txt":
                yield from (document for document, _ in self._text(path, 0, PIECE))
            else:
                yield from (document for document, _ in self._records(path, 0, 0))

    def _records(self, path: Path, done: int, byte: int) -> Iterator[tuple[Document, tuple[int, int]]]:
        """Documents of a file of records, each with the number of lines or rows up to its end, and their bytes."""
        if ending(path) == ".parquet":
            rows = parquet_records(path, fields_of(self.source), done, self.section)
            read = ((f"{path}, row {row}", record, (row + 1, 0)) for row, record in rows)
        else:
            lines = _records(path, done, byte, self.section, self.source.encoding)
            read = ((f"{path}:{line}", record, (line, end)) for line, end, record in lines)
        for place, record, after in read:
            document = as_document(record, place, self.section, self.source)
            if document is not None:
                yield document, after

    def _text(self, path: Path, skip: int, most: int | None = None) -> Iterator[tuple[Document, int]]:
        """The pieces of a text file after `skip` characters, or only its first `most` characters."""
        where = f"{self.section}.path: {path}"
        try:
            file, codec = open_text(path, self.source.encoding, self.section)
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        try:
            with file:
                if most is not None:
                    if (text := file.read(most)).strip():
                        yield Document("text", text, None, where), len(text)
                    return
                for piece in pieces(file.read, self.cuts, skip):
                    if piece.more or piece.before or piece.text.strip():
                        yield Document("text", piece.text, None, where, piece.before, piece.more), piece.end
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(fault_in(path, codec, self.section)) from error


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a `.jsonl` file, each with its place (`file:line`).

    Raises:
        ValueError: a line is not a JSON object, or the file cannot be read.
    """
    for line, _, record in _records(path):
        if isinstance(record, BadRecord):
            raise record
        yield f"{path}:{line}", record


def parquet_records(
    path: Path, columns: list[str], start: int = 0, section: str = "data"
) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Rows from number `start`, each with its number (a `BadRecord` if unusable). Earlier row groups are not read.

    Raises:
        ValueError: the file is damaged or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise _MissingColumn(f"{path} has no column {column!r}; it has: {', '.join(names)}")
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= start:
                    row += size
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    skipped = min(max(start - row, 0), len(batch))
                    yield from enumerate(_rows(batch.slice(skipped), path, row + skipped, section), row + skipped)
                    row += len(batch)
    except _MissingColumn as error:
        raise ValueError(f"{section}: {error}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{section}.path: {path} cannot be read from row {row} onwards: {error}") from error


class _MissingColumn(Exception):
    pass


def _rows(batch: Any, path: Path, first: int, section: str) -> list[Any]:
    """The batch's rows; a row with a string that is not UTF-8 becomes a `BadRecord`."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [BadRecord(f"{section}.path: {path}, row {first} is not UTF-8 ({error.reason})")]
        return [row for n in range(len(batch)) for row in _rows(batch.slice(n, 1), path, first + n, section)]


def _records(
    path: Path, done: int = 0, byte: int = 0, section: str = "data", encoding: str | None = None
) -> Iterator[tuple[int, int, dict[str, Any] | BadRecord]]:
    """Objects after the first `done` lines (`byte` bytes): line number, bytes up to the end of the line, object.

    A line without a usable object gives a `BadRecord`.
    """
    for line, end, written, codec in _lines(path, done, byte, section, encoding):
        place, record = f"{section}.path: {path}:{line}", None
        try:
            text = written.decode(codec.name).lstrip("\ufeff")
            if not text.strip():
                continue
            record = json.loads(text)
        except UnicodeDecodeError as error:
            offset, wrong = end - len(written) + error.start, error.object[error.start]
            record = BadRecord(undecodable(codec, section, f"{path}:{line}", offset, wrong))
        except json.JSONDecodeError as error:
            record = BadRecord(f"{place} is not JSON ({error.msg} at character {error.pos})")
        except (ValueError, RecursionError) as error:  # numbers with too many digits, or too deep nesting
            record = BadRecord(f"{place} cannot be parsed as JSON ({error})")
        if not isinstance(record, dict | BadRecord):
            record = BadRecord(f"{place}: expected a JSON object; found {type(record).__name__}")
        yield line, end, record


def _lines(
    path: Path, line: int, byte: int, section: str, encoding: str | None
) -> Iterator[tuple[int, int, bytes, Codec]]:
    zstd = zstd_module() if ending(path) == ".jsonl.zst" else None
    opened: Any = zstd.open if zstd else gzip.open if ending(path) == ".jsonl.gz" else open
    broken = (OSError, EOFError, zlib.error) + ((zstd.ZstdError,) if zstd else ())
    try:
        with opened(path, "rb") as file:
            codec = codec_of(file.read(HEAD), encoding, section, path)
            byte = max(byte, codec.begin)
            file.seek(byte)
            for text in byte_lines(file, codec):
                line, byte = line + 1, byte + len(text)
                yield line, byte, text, codec
    except broken as error:
        raise ValueError(f"{section}.path: {path} cannot be read after line {line}: {error}") from error


def zstd_module() -> Any:
    """The standard library's `zstd` module or, before Python 3.14, its backport."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
