"""Documents packed into rows of token ids: every token exactly once per pass, in an order fixed by the seed.

R rows · T positions in a context.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r.config.text import DataConfig
from c2r.text.mixture import MIXER_START, PART_START, MixedSource, Mixer, Position, Skipped
from c2r.text.sources import Shard, SpellingLists, check_source, held_out_kept, keeps_part, open_reader, read_shard
from c2r.text.spelling import vocabulary_words
from c2r.text.tokenizing import Encode, Encoder, Tokenized, bos_of, opens_with_bos, special_ids, text_ids

__all__ = [
    "Rows",
    "Skipped",
    "bos_of",
    "check_source",
    "held_out_kept",
    "opens_with_bos",
    "packed_rows",
    "pass_of",
    "text_rows",
]


class Rows(NamedTuple):
    """A batch of packed rows."""

    ids: Tensor
    """Token ids `[R, T]`; rows begin with BOS according to `data.prepend_bos`, and the last may end in padding."""
    real: Tensor
    """Bool `[R, T]`: tokens whose activations are used; false for padding and special tokens."""
    position: Position | None = None
    """The reader's position before these rows, JSON-serializable. Started from it, the same kind of reader yields these
    rows again (`packed_rows(..., start=position)` or `shuffled_rows`). None for rows from elsewhere."""


def packed_rows(
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int = 0,
    rows: int = 32,
    held_out: bool = False,
    epochs: int | None = 1,
    start: Position | None = None,
    shard: Shard = (0, 1),
    skipped: Skipped | None = None,
    embeddings: int | None = None,
) -> Iterator[Rows]:
    """Batches of up to `rows` rows of `config.context` tokens.

    Documents are concatenated with EOS between them and cut into rows. Spelling lists are interleaved so that they make
    up `config.spelling_fraction` of the tokens. With `config.rows: as_is` each document is its own row, cut or padded.
    An epoch is one pass over the source in an order of its own; its last row is padded. The parts of a mixture make
    their passes independently, and a mixture ends when every part has completed `epochs` passes.

    Arguments:
        config: the text.
        tokenizer: tokenizer of the language model.
        seed: seed of the order.
        rows: R, the rows per batch.
        held_out: read the part held out for evaluation, if the source has one.
        epochs: number of passes; None: endless.
        start: `position` of earlier rows, from which to resume with exactly those rows, even if `rows` differs. Of the
            text before it, only the document in which the first row begins is tokenised again.
        shard: (index, count) of the readers that divide the documents among themselves.
        skipped: counts the records that are skipped.
        embeddings: number of rows of the model's embedding matrix; None: ids are not checked.

    Raises:
        ValueError: the source has no text; it does not match the tokenizer, or its ids exceed the embeddings;
            `spelling_fraction` > 0 and the tokenizer has too few whole words; or `start` is a position in other text.
    """
    encode = Encode(config, tokenizer, embeddings)
    known = (start or {}).get("kept", [None] * len(config.sections))
    readers = {
        section: open_reader(section, source, held_out, encode.cuts, kept)
        for (section, source), kept in zip(config.sections.items(), known, strict=False)
    }
    lists = _spelling_lists(config, tokenizer)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: got {shard}; accepted: (index, count) with 0 ≤ index < count")

    def read() -> Iterator[Rows]:
        text: Position = {
            "seed": seed,
            "shard": list(shard),
            "text": [reader.identity() for reader in readers.values()],
        }
        if start is not None:
            _check_start(text, start)
        text["kept"] = [keeps_part(reader) for reader in readers.values()]
        at = start or {"parts": [PART_START] * len(readers), **MIXER_START}
        encoder = Encoder(encode, config.workers)
        try:
            parts = [
                MixedSource(section, config.sections[section], reader, encoder, seed, shard, state, skipped)
                for (section, reader), state in zip(readers.items(), at["parts"], strict=True)
            ]
            if skipped is not None:
                skipped.parts = parts
            spelling = None
            if lists is not None:  # evaluation reads different lists than training, just as it reads different files
                spelling = encoder.encoded(
                    read_shard(lists, seed + 1_000_003 if held_out else seed, shard, at["lists"])
                )
            mixer = Mixer(parts, spelling, config.spelling_fraction, at)
            skip = start["skip"] if start else 0
            while epochs is None or any(part.passes < epochs for part in parts):
                last = epochs if len(parts) > 1 else parts[0].passes + 1
                documents = mixer.until(last)
                if config.rows == "as_is":
                    yield from _as_is(documents, encode, config.context, rows, text)
                else:
                    yield from _cut(documents, skip, encode, config.context, rows, text)
                mixer.reset()
                skip = 0
        finally:
            encoder.close()

    return read()


def pass_of(position: Position | None) -> int | None:
    """The pass over the source to which rows of `packed_rows` belong, by their position; None for a mixture."""
    parts = [] if position is None else position["parts"]
    return parts[0][0] if len(parts) == 1 else None


def _cut(
    documents: Iterator[tuple[Position, Tokenized]],
    skip: int,
    encode: Encode,
    context: int,
    rows: int,
    text: Position,
) -> Iterator[Rows]:
    """Rows of the documents' concatenated tokens, without the first `skip` tokens of the first document."""
    bos = encode.bos
    opening = 0 if bos is None else 1
    room = context - opening
    held: deque[tuple[Position, Tokenized]] = deque()
    length = -skip
    while True:
        while length < rows * room and (more := next(documents, None)) is not None:
            held.append(more)
            length += len(more[1].ids)
        take = min(length, rows * room)
        if take <= 0:
            return
        position = text | held[0][0] | {"skip": skip}
        shape = (-(-take // room), context)
        ids = np.full(shape, _filler(encode.tokenizer), np.int64)
        real = np.zeros(shape, bool)
        if bos is not None:
            ids[:, 0] = bos
        flat_ids, flat_real = np.empty(take, np.int64), np.empty(take, bool)
        filled = 0
        while filled < take:
            encoded = held[0][1]
            part = slice(skip, skip + take - filled)
            size = len(encoded.ids[part])
            flat_ids[filled : filled + size] = encoded.ids[part]
            flat_real[filled : filled + size] = encoded.real[part]
            filled, skip = filled + size, skip + size
            if skip == len(encoded.ids):
                held.popleft()
                skip = 0
        length -= take
        for row, first in enumerate(range(0, take, room)):
            piece = slice(first, first + room)
            size = len(flat_ids[piece])
            ids[row, opening : opening + size] = flat_ids[piece]
            real[row, opening : opening + size] = flat_real[piece]
        yield Rows(torch.from_numpy(ids), torch.from_numpy(real), position)


def _as_is(
    documents: Iterator[tuple[Position, Tokenized]], encode: Encode, context: int, rows: int, text: Position
) -> Iterator[Rows]:
    """One row per document."""
    while batch := list(itertools.islice(documents, rows)):
        ids = np.full((len(batch), context), _filler(encode.tokenizer), np.int64)
        real = np.zeros(ids.shape, bool)
        for row, (_, encoded) in enumerate(batch):
            size = min(len(encoded.ids), context)
            ids[row, :size], real[row, :size] = encoded.ids[:size], encoded.real[:size]
        yield Rows(torch.from_numpy(ids), torch.from_numpy(real), text | batch[0][0] | {"skip": 0})


def _filler(tokenizer: Any) -> int:
    """The token id used for padding."""
    named = (getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos"))
    return next((index for index in named if index is not None), 0)


def _check_start(text: Position, start: Position) -> None:
    for key, value in text.items():
        if start.get(key) != value:
            raise ValueError(f"data: cannot resume reading: the {key} was {start.get(key)} and is now {value}")


def text_rows(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    context: int,
    rows: int = 32,
    prepend_bos: bool | None = None,
    parse_special_tokens: bool = False,
) -> Iterator[Rows]:
    """Batches of up to `rows` texts in their order, one text per row, cut to `context` or padded.

    `prepend_bos` and `parse_special_tokens` have the same meaning as in `DataConfig`.
    """
    bos = bos_of(tokenizer, prepend_bos)
    opening = [] if bos is None else [bos]
    filler = _filler(tokenizer)
    special = torch.tensor(sorted(special_ids(tokenizer)), dtype=torch.int64)
    for start in range(0, len(texts), rows):
        found = text_ids(tokenizer, list(texts[start : start + rows]), parse_special_tokens)
        cut = [(opening + ids)[:context] for ids in found]
        length = max(1, *map(len, cut))
        ids = torch.tensor([row + [filler] * (length - len(row)) for row in cut])
        real = torch.arange(length) < torch.tensor([[len(row)] for row in cut])
        real &= ~torch.isin(ids, special)
        yield Rows(ids, real)


def _spelling_lists(config: DataConfig, tokenizer: Any) -> SpellingLists | None:
    """The spelling lists, if `config.spelling_fraction` > 0.

    Raises:
        ValueError: the tokenizer has fewer than 200 whole words.
    """
    if config.spelling_fraction == 0:
        return None
    words = vocabulary_words(tokenizer)
    if len(words) < 200:
        raise ValueError(
            f"data.spelling_fraction: got {config.spelling_fraction}, but the tokenizer has only {len(words)} "
            "whole words (at least 200 are needed); use spelling_fraction: 0"
        )
    return SpellingLists(words)
