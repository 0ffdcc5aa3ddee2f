"""Decode files to text: by the byte order mark, else by the configured encoding, else as strict UTF-8. No guessing."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEAD = 4096
"""Number of bytes at the start of a file from which its encoding is determined."""
_MARKS = (  # UTF-32 first: its little-endian mark starts with the bytes of UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Python's names for "with a byte order mark". Where the mark is missing, Python reads little-endian.
_PLAIN = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_BLOCK = 2**20


class Codec(NamedTuple):
    """How a file is decoded."""

    name: str
    """Python's name of the encoding; never one that expects a byte order mark."""
    begin: int
    """Length of the byte order mark in bytes; text begins after it."""

    @property
    def shown(self) -> str:
        """The name as it appears in messages."""
        return self.name.upper() if self.name.startswith("utf") else self.name


def codec_of(head: bytes, encoding: str | None, section: str, path: Path) -> Codec:
    """The codec of a file that begins with the bytes `head`.

    Raises:
        ValueError: the file has no byte order mark, no `encoding` is given, and its zero bytes look like UTF-16 or
            UTF-32.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return Codec(name, len(mark))
    if encoding is not None:
        name = codecs.lookup(encoding).name
        return Codec(_PLAIN.get(name, name), 0)
    likely = _wide(head)
    if likely is not None:
        raise ValueError(
            f"{section}.path: {path} looks like {likely.upper()} without a byte order mark (it has zero bytes, the "
            f"first at offset {head.index(0)}); set {section}.encoding: {likely}, or utf-8 if that is correct"
        )
    return Codec("utf-8", 0)


def _wide(head: bytes) -> str | None:
    """The UTF-16 or UTF-32 variant that the positions of the zero bytes suggest, else None."""
    zeros = [head[place::4].count(0) for place in range(4)]
    total, units = sum(zeros), max(len(head) // 4, 1)
    for name, high in (("utf-32-le", (2, 3)), ("utf-32-be", (0, 1))):
        if len(head) >= 8 and min(zeros[place] for place in high) >= 0.9 * units:
            return name
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    # Non-Latin text has zero bytes only in spaces and line breaks, but always in the same half of each unit.
    if total >= 2 and not (even and odd) and total >= (0.2 if total < 8 else 0.02) * len(head):
        return "utf-16-le" if odd else "utf-16-be"
    return None


def open_text(path: Path, encoding: str | None, section: str) -> tuple[io.TextIOWrapper, Codec]:
    """Open a text file, positioned after its byte order mark; every kind of line break is read as a line feed.

    Raises:
        ValueError: see `codec_of`.
        OSError: the file cannot be opened.
    """
    file = path.open("rb")
    try:
        codec = codec_of(file.read(HEAD), encoding, section, path)
        file.seek(codec.begin)
    except BaseException:
        file.close()
        raise
    return io.TextIOWrapper(file, encoding=codec.name, errors="strict", newline=None), codec


def undecodable(codec: Codec, section: str, place: str, offset: int, byte: int) -> str:
    """The message for a byte that is invalid in the encoding; `offset` counts the file's bytes from 0."""
    return (
        f"{section}.path: {place} is not {codec.shown}: byte 0x{byte:02x} at offset {offset:,}; if the file has "
        f"another encoding, set {section}.encoding, for example to cp1252 or utf-16-le"
    )


def fault_in(path: Path, codec: Codec, section: str) -> str:
    """The message for the first byte of a text file that is invalid in its encoding."""
    decoder: Any = codecs.getincrementaldecoder(codec.name)("strict")
    offset, line = codec.begin, 1
    with path.open("rb") as file:
        file.seek(offset)
        while True:
            block = file.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(codec.name, "replace").count("\n")
                byte = error.object[error.start]
                return undecodable(codec, section, f"{path}:{line}", offset - pending + error.start, byte)
            if not block:
                return f"{section}.path: {path} is not {codec.shown}"
            offset, line = offset + len(block), line + text.count("\n")


def byte_lines(file: Any, codec: Codec) -> Iterator[bytes]:
    """Lines of a binary file from its current position, each including its line break."""
    end = "\n".encode(codec.name)
    if end == b"\n":
        yield from file
        return
    line = b""
    while block := file.read(_BLOCK):
        start, found = 0, max(0, len(line) - len(end) + 1)
        line += block
        while (found := line.find(end, found)) >= 0:
            if (found - start) % len(end):  # the end of one character and the beginning of the next
                found += 1
                continue
            found += len(end)
            yield line[start:found]
            start = found
        line = line[start:]
    if line:
        yield line


def surrogate_in(text: str) -> str | None:
    """Describe the first half of a surrogate pair in a text (not a valid character); None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])[1:-1]
        return f"half of a surrogate pair ({found}, not a valid character) at character {error.start:,}"
    return None
