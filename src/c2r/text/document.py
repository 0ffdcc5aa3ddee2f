"""A document in one of the forms that sources have, and how a record of a file or data set becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from c2r.config.text import TextSource


class BadRecord(ValueError):
    """A record that cannot be used; the message names the field, the place, what was found and what is accepted."""


class Document(NamedTuple):
    """A document, or a piece of a long one: pieces follow one another, and all but the last have `more` after them."""

    form: Literal["text", "chat", "tokens", "bad"]
    content: Any
    """A string, a list of messages, or token ids `[n]`; of a bad record what is wrong with it."""
    mask: Any = None
    """Of tokens: bool `[n]`, which of them have activations that are used; None: all."""
    where: str = ""
    """Field of the configuration, and place in the source, for errors: `data.tokens_field: corpus.jsonl:7`."""
    before: str = ""
    """The end of the preceding piece, without which the first tokens may differ; "" where a document begins."""
    more: bool = False
    """Whether the document continues in the next piece."""


Read = Iterator[tuple[Document, Callable[[], Any]]]
"""Documents, each with a function that says, until the next is asked for, where the reader stands after it."""


class Reader(Protocol):
    """Documents in an order fixed by a seed, from any position on."""

    @property
    def identity(self) -> str:
        """Changes where the source changes so that positions of before mean nothing."""
        ...

    def read(self, seed: int, start: Any = None) -> Read:
        """One pass in the order of `seed`, from the position `start` (a JSON value) on. Empty documents are left out.

        Raises:
            ValueError: something cannot be read, or is not what the configuration says; names field and place.
        """
        ...


def fields_of(source: TextSource) -> list[str]:
    """The fields of a record that are read."""
    if source.tokens_field is not None:
        return [source.tokens_field] + ([source.mask_field] if source.mask_field is not None else [])
    return [source.chat_field or source.text_field]


def as_document(record: Mapping[str, Any] | BadRecord, place: str, section: str, source: TextSource) -> Document | None:
    """The document in a record; None for an empty one. A bad record is a document of that form if these are skipped.

    Raises:
        BadRecord: the record, or its field, is missing or something else, and bad records are errors.
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
            raise BadRecord(f"{section}.mask_field: {place} has {len(ids)} tokens and a mask of {len(mask)}")
        mask = mask.astype(bool)
    return Document("tokens", ids, mask, where) if len(ids) else None


def _whole_numbers(value: Any) -> np.ndarray | None:
    if not isinstance(value, list | np.ndarray):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        return None
    if array.size == 0:
        return np.zeros(0, np.int64)
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iub" else None


def _instead(record: Mapping[str, Any], field: str) -> str:
    if field in record:
        return f" but {type(record[field]).__name__}: {record[field]!r:.80}"
    return f"; it has: {', '.join(map(str, record))}"
