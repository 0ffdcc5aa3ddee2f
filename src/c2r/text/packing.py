"""Documents packed into rows of token ids: every token once, none lost, in an order fixed by the seed.

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
from c2r.text.mixture import MIXER_START, PART_START, Mixer, Part, Position, Skipped
from c2r.text.sources import Shard, SpellingLists, check_source, held_out_kept, keeps_part, open_reader, read_shard
from c2r.text.spelling import vocabulary_words
from c2r.text.tokenizing import Encode, Encoded, Encoder, bos_of, opens_with_bos, special_ids, text_ids

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
    """Token ids `[R, T]`; a row opens with BOS as `data.prepend_bos` says, and the last may end in padding."""
    real: Tensor
    """Bool `[R, T]`: tokens whose activations are used; neither padding nor any special token."""
    position: Position | None = None
    """Where the reader stood before these rows, as JSON holds it: the reader that gave them goes on with them from it
    (`packed_rows(..., start=position)`, or `shuffled_rows`). None for rows that do not come from such a reader."""


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

    Documents are joined, EOS between them, and cut into rows; spelling lists come in between until they make up
    `config.spelling_fraction` of the tokens. With `config.rows: as_is` each document is a row instead, cut or padded.
    An epoch is one pass over the source, in an order of its own, its end padded; None never ends. The parts of
    a mixture make their passes each by itself; a mixture ends when every part has made `epochs` of them.

    Arguments:
        config: the text.
        tokenizer: of the language model.
        seed: of the order.
        rows: R, of a batch.
        held_out: whether to read what is kept for evaluation, where the source keeps something.
        epochs: passes, or None.
        start: position of earlier rows: goes on with exactly those, whatever `rows` was. Of what was read before
            nothing is tokenised again but the document that the first row begins in.
        shard: index and count of readers that share the documents.
        skipped: counts records that are skipped.
        embeddings: rows of the model's embeddings; None leaves ids unchecked.

    Raises:
        ValueError: the source has no text; it does not fit the tokenizer, or its ids the embeddings; `words` > 0 and
            the tokenizer knows too few whole words; or `start` is a position in other text.
    """
    encode = Encode(config, tokenizer, embeddings)
    known = (start or {}).get("kept", [None] * len(config.sections))
    readers = {
        section: open_reader(section, source, held_out, encode.cuts, kept)
        for (section, source), kept in zip(config.sections.items(), known, strict=False)
    }
    lists = _spelling_lists(config, tokenizer)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: got {shard}; accepted are an index and a count, 0 ≤ index < count")

    def read() -> Iterator[Rows]:
        text: Position = {"seed": seed, "shard": list(shard), "text": [reader.identity for reader in readers.values()]}
        if start is not None:
            _check_start(text, start)
        text["kept"] = [keeps_part(reader) for reader in readers.values()]
        at = start or {"parts": [PART_START] * len(readers), **MIXER_START}
        encoder = Encoder(encode, config.workers)
        try:
            parts = [
                Part(section, config.sections[section], reader, encoder, seed, shard, state, skipped)
                for (section, reader), state in zip(readers.items(), at["parts"], strict=True)
            ]
            if skipped is not None:
                skipped.parts = parts
            spelling = None
            if lists is not None:  # evaluation sees other lists than training, as it sees other files
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
    """Which pass over the source rows of `packed_rows` are of, by their position; None for a mixture."""
    parts = [] if position is None else position["parts"]
    return parts[0][0] if len(parts) == 1 else None


def _cut(
    documents: Iterator[tuple[Position, Encoded]],
    skip: int,
    encode: Encode,
    context: int,
    rows: int,
    text: Position,
) -> Iterator[Rows]:
    """Rows of the documents' tokens, without the `skip` first tokens of the first."""
    bos = encode.bos
    opening = 0 if bos is None else 1
    room = context - opening
    held: deque[tuple[Position, Encoded]] = deque()
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
    documents: Iterator[tuple[Position, Encoded]], encode: Encode, context: int, rows: int, text: Position
) -> Iterator[Rows]:
    """A document a row."""
    while batch := list(itertools.islice(documents, rows)):
        ids = np.full((len(batch), context), _filler(encode.tokenizer), np.int64)
        real = np.zeros(ids.shape, bool)
        for row, (_, encoded) in enumerate(batch):
            size = min(len(encoded.ids), context)
            ids[row, :size], real[row, :size] = encoded.ids[:size], encoded.real[:size]
        yield Rows(torch.from_numpy(ids), torch.from_numpy(real), text | batch[0][0] | {"skip": 0})


def _filler(tokenizer: Any) -> int:
    """What fills up a row."""
    named = (getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos"))
    return next((index for index in named if index is not None), 0)


def _check_start(text: Position, start: Position) -> None:
    for key, value in text.items():
        if start.get(key) != value:
            raise ValueError(f"data: cannot go on with the text: its {key} was {start.get(key)}, and is {value} now")


def text_rows(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    context: int,
    rows: int = 32,
    prepend_bos: bool | None = None,
    parse_special_tokens: bool = False,
) -> Iterator[Rows]:
    """Batches of up to `rows` texts in their order, one per row, which is cut to `context`, or padded.

    `prepend_bos` and `parse_special_tokens` are those of `DataConfig`.
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
    """The spelling lists that `config.spelling_fraction` asks for.

    Raises:
        ValueError: the tokenizer has fewer than 200 whole words.
    """
    if config.spelling_fraction == 0:
        return None
    words = vocabulary_words(tokenizer)
    if len(words) < 200:
        raise ValueError(
            f"data.spelling_fraction: got {config.spelling_fraction}, but the tokenizer has only {len(words)} "
            "whole words; use spelling_fraction: 0"
        )
    return SpellingLists(words)
