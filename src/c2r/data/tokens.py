"""Documents packed into rows of token ids: every token once, none lost, in an order fixed by the seed.

R rows · T positions in a context.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from c2r.config import DataConfig
from c2r.data.text import (
    file_documents,
    file_paths,
    hf_documents,
    spelling_documents,
    stdlib_documents,
    vocabulary_words,
)


class Rows(NamedTuple):
    """A batch of packed rows."""

    ids: Tensor
    """Token ids `[R, T]`; a row opens with BOS where the tokenizer has one, and the last may end in padding."""
    real: Tensor
    """Bool `[R, T]`: neither BOS, EOS nor padding."""
    position: dict[str, Any] | None = None
    """Where the reader stood before these rows, as JSON holds it: `packed_rows(..., start=position)` goes on with them.
    None for rows that do not come from `packed_rows`."""


def documents(config: DataConfig, seed: int, *, held_out: bool = False) -> Iterable[str]:
    """The documents of the configured source.

    `held_out` asks for text to evaluate on: for `stdlib` the files that neither the embedded model nor an SAE is
    trained on. Other sources have no such part: it is the same text, and the caller has to say so.
    """
    if config.source == "stdlib":
        return stdlib_documents(seed, held_out=held_out)
    if config.source == "files":
        return file_documents(config.path or "", config.text_field, seed)
    return hf_documents(config.path or "", config.split, config.text_field, config.name, seed)


def check_source(config: DataConfig) -> None:
    """Find what is wrong with the source before a model is loaded.

    Raises:
        ValueError: missing files, or a source whose every document is empty.
    """
    if config.source == "files":
        file_paths(config.path or "")
    if next(iter(documents(config, 0)), None) is None:
        raise ValueError(f"data.{'path' if config.path else 'source'}: {config.path or config.source} holds no text")


def packed_rows(
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int = 0,
    rows: int = 32,
    held_out: bool = False,
    epochs: int | None = 1,
    start: dict[str, Any] | None = None,
) -> Iterator[Rows]:
    """Batches of up to `rows` rows of `config.context` tokens.

    Documents are joined, EOS between them, and cut into rows; spelling lists come in between until they make up
    `config.words` of the tokens. An epoch is one pass over the source, its end padded; None goes on without end.
    `start`, the position of earlier rows, goes on with exactly those, whatever `rows` was; what was read before is
    not tokenised again.

    Raises:
        ValueError: the source has no text, or `words` > 0 and the tokenizer knows too few whole words.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = {i for i in (bos, eos, tokenizer.pad_token_id) if i is not None}
    filler = next((i for i in (tokenizer.pad_token_id, eos, bos) if i is not None), 0)
    opening = [] if bos is None else [bos]
    room = config.context - len(opening)
    # Evaluation sees other lists than training, as it sees other files.
    lists = spelling_lists(config, tokenizer, seed + 1_000_003 if held_out else seed)
    at = {"epoch": 0, "texts": 0, "lists": 0, "tokens": 0, "spelled": 0, "skip": 0, "real": False} | (start or {})
    for _ in range(at["lists"]):
        next(lists)
    for epoch in itertools.count(at["epoch"]) if epochs is None else range(at["epoch"], epochs):
        texts = itertools.islice(iter(documents(config, seed + epoch, held_out=held_out)), at["texts"], None)
        encoded = _encoded(texts, lists, config.words, tokenizer, eos, at)
        skip, found = at["skip"], at["real"]
        pending: list[tuple[dict[str, Any], list[int]]] = []
        while True:
            while sum(len(ids) for _, ids in pending) - skip < rows * room and (more := next(encoded, None)):
                pending.append(more)
            tokens = list(itertools.chain.from_iterable(ids for _, ids in pending))[skip : skip + rows * room]
            if not tokens:
                break
            position = {**pending[0][0], "epoch": epoch, "skip": skip, "real": found}
            batch = [tokens[first : first + room] for first in range(0, len(tokens), room)]
            lengths = torch.tensor([[len(opening) + len(row)] for row in batch])
            ids = torch.tensor([opening + row + [filler] * (room - len(row)) for row in batch])
            real = torch.arange(config.context) < lengths
            for token in special:
                real &= ids != token
            found |= bool(real.any())
            yield Rows(ids, real, position)
            skip += len(tokens)
            while pending and len(pending[0][1]) <= skip:
                skip -= len(pending.pop(0)[1])
        if not found:  # also if every token is special: rows without end would hold nothing to learn from
            raise ValueError(f"data.source: {config.path or config.source} holds no text; nothing to train on")
        at |= {"texts": 0, "tokens": 0, "spelled": 0, "skip": 0, "real": False}


def text_rows(texts: Sequence[str], tokenizer: Any, *, context: int, rows: int = 32) -> Iterator[Rows]:
    """Batches of up to `rows` texts in their order, one a row: BOS if there is one, cut to `context`, then padding."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    opening = [] if bos is None else [bos]
    filler = next((i for i in (pad, eos, bos) if i is not None), 0)
    for start in range(0, len(texts), rows):
        found = tokenizer(list(texts[start : start + rows]), add_special_tokens=False)["input_ids"]
        cut = [(opening + ids)[:context] for ids in found]
        length = max(1, *map(len, cut))
        ids = torch.tensor([row + [filler] * (length - len(row)) for row in cut])
        real = torch.arange(length) < torch.tensor([[len(row)] for row in cut])
        for token in {i for i in (bos, eos, pad) if i is not None}:
            real &= ids != token
        yield Rows(ids, real)


def spelling_lists(config: DataConfig, tokenizer: Any, seed: int) -> Iterator[str]:
    """The spelling lists that `config.words` asks for.

    Raises:
        ValueError: the tokenizer has fewer than 200 whole words.
    """
    if config.words == 0:
        return iter(())
    words = vocabulary_words(tokenizer)
    if len(words) < 200:
        raise ValueError(
            f"data.words: got {config.words}, but the tokenizer has only {len(words)} whole words; use words: 0"
        )
    return spelling_documents(words, seed)


def _encoded(
    texts: Iterable[str], lists: Iterator[str], share: float, tokenizer: Any, eos: int | None, at: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Token ids of documents and lists in turn, each with where the reader stood before it; `at` is brought forward."""
    end = [] if eos is None else [eos]
    texts = iter(texts)
    while True:
        before = dict(at)
        spelling = at["spelled"] < share * at["tokens"]
        text = next(lists if spelling else texts, None)
        if text is None:
            return
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + end
        at["tokens"] += len(ids)
        if spelling:
            at["spelled"] += len(ids)
        at["lists" if spelling else "texts"] += 1
        yield before, ids
