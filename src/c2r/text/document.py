"""Documents in the forms that sources provide, and how a record of a file or data set becomes one.

n tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from c2r.config.text import TextSource


class BadRecord(ValueError):
    """A record that cannot be used; the message gives the field, the place, what was found and what is accepted."""


class Document(NamedTuple):
    """A document, or one piece of a long one. Pieces are consecutive; `more` is true for all but the last."""

    form: Literal["text", "chat", "tokens", "bad"]
    content: Any
    """A string, a list of messages, or token ids `[n]`; for a bad record, a description of what is wrong with it."""
    mask: Any = None
    """For token ids: bool `[n]`, the tokens whose activations are used; None: all of them."""
    where: str = ""
    """Field of the configuration and place in the source, for errors: `data.tokens_field: corpus.jsonl:7`."""
    before: str = ""
    """The end of the preceding piece, which the first tokens may depend on; "" at the beginning of a document."""
    more: bool = False
    """Whether the document continues in the next piece."""


Read = Iterator[tuple[Document, Callable[[], Any]]]
"""Documents, each with a function that returns the reader's position after it. Call it before requesting the next
document."""


@runtime_checkable
class Reader(Protocol):
    """Documents in an order fixed by a seed, starting at any position."""

    def identity(self) -> str:
        """A string that changes whenever the source changes in a way that makes earlier positions invalid."""
        ...

    def read(self, seed: int, start: Any = None) -> Read:
        """One pass in the order given by `seed`, starting at position `start` (a JSON value). Empty documents are
        skipped.

        Raises:
            ValueError: something cannot be read or does not match the configuration; the message gives field and place.
        """
        ...


def fields_of(source: TextSource) -> list[str]:
    """Names of the record fields that the source reads."""
    if source.tokens_field is not None:
        return [source.tokens_field] + ([source.mask_field] if source.mask_field is not None else [])
    return [source.chat_field or source.text_field]


def as_document(record: Mapping[str, Any] | BadRecord, place: str, section: str, source: TextSource) -> Document | None:
    """The document in a record; None if it is empty. With `bad_records: skip`, a bad record gives a "bad" document.

    Raises:
        BadRecord: the record or its field is missing or has the wrong type, with `bad_records: error`.
    """
    try:
        if isinstance(record, BadRecord):
            raise record
        return _document(record, place, section, source)
    except BadRecord as error:
        if source.bad_records == "error":
            raise
        return Document("bad", str(error))


def _document(record: Mapping[str, Any], place: str, section: str, source: TextSource) -> Document | None:
    if source.tokens_field is not None:
        return _tokens(record, place, section, source.tokens_field, source.mask_field)
    if source.chat_field is not None:
        return _chat(record, place, section, source.chat_field)
    where, field = f"{section}.text_field: {place}", source.text_field
    text = record.get(field)
    if not isinstance(text, str):
        raise BadRecord(f"{where} has no text under {field!r}{_instead(record, field)}")
    return Document("text", text, None, where) if text.strip() else None


def _chat(record: Mapping[str, Any], place: str, section: str, field: str) -> Document | None:
    where, messages = f"{section}.chat_field: {place}", record.get(field)
    if not isinstance(messages, list):
        raise BadRecord(f"{where} has no list of messages under {field!r}{_instead(record, field)}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadRecord(f"{where}: expected messages with 'role', a string, and 'content'; found {message!s:.200}")
    return Document("chat", messages, None, where) if messages else None


def _tokens(record: Mapping[str, Any], place: str, section: str, field: str, mask_field: str | None) -> Document | None:
    where = f"{section}.tokens_field: {place}"
    ids = _whole_numbers(record.get(field))
    if ids is None:
        raise BadRecord(f"{where} has no list of token ids under {field!r}{_instead(record, field)}")
    mask = None
    if mask_field is not None:
        mask = _whole_numbers(record.get(mask_field))
        if mask is None or not np.isin(mask, (0, 1)).all():
            raise BadRecord(
                f"{section}.mask_field: {place} has no list of 0 and 1 under {mask_field!r}"
                + _instead(record, mask_field)
            )
        if len(mask) != len(ids):
            raise BadRecord(f"{section}.mask_field: {place} has {len(ids)} tokens but a mask of length {len(mask)}")
        mask = mask.astype(bool)
    return Document("tokens", ids, mask, where) if len(ids) else None


def _whole_numbers(value: Any) -> np.ndarray | None:
    if not isinstance(value, list | np.ndarray):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of different lengths
        return None
    if array.size == 0:
        return np.zeros(0, np.int64)
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iub" else None


def _instead(record: Mapping[str, Any], field: str) -> str:
    if field in record:
        return f": found {type(record[field]).__name__}: {record[field]!r:.80}"
    return f"; its fields are: {', '.join(map(str, record))}"
