"""Encode documents to token ids, in this process or in loader processes; results keep the documents' order.

n tokens of a document or piece.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from c2r.config.text import DataConfig
from c2r.text.decoding import surrogate_in
from c2r.text.document import BadRecord, Document
from c2r.text.pieces import PIECE, Cuts, characters, pieces

# Maximum size of one task of a loader process.
_DOCUMENTS, _CHARACTERS = 64, 200_000


class Tokenized(NamedTuple):
    """Tokens of a document or of a piece of one, with EOS at the document's end if the tokenizer has one."""

    ids: np.ndarray
    """int32 `[n]`."""
    real: np.ndarray
    """bool `[n]`: tokens whose activations are used."""
    more: bool = False
    """Whether the document continues in the next piece."""
    bad: str | None = None
    """Description of what is wrong with the record, which then has no tokens; None: nothing."""


def beyond(index: int, rows: int) -> str:
    """The end of a message about an id that exceeds the model's embedding matrix."""
    return (
        f"has id {index}, but the model's embedding matrix has only {rows} rows; give the tokenizer that belongs to "
        "the model (model.tokenizer), or enlarge and train the embeddings (resize_token_embeddings in transformers)"
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of BOS, EOS, padding and all other tokens that the tokenizer marks as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}


def bos_of(tokenizer: Any, prepend_bos: bool | None) -> int | None:
    """Id of the BOS at the beginning of each row, according to `data.prepend_bos`; None: rows begin with text.

    Raises:
        ValueError: `prepend_bos` is true, but the tokenizer has no BOS.
    """
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is None:
        raise ValueError("data.prepend_bos: got true, but the tokenizer has no BOS; use null or false")
    return None if prepend_bos is False else bos


def opens_with_bos(config: DataConfig, tokenizer: Any) -> bool:
    """Whether each row begins with BOS; SAE folders record this as `prepend_bos`.

    Raises:
        ValueError: see `bos_of`.
    """
    return config.rows == "packed" and bos_of(tokenizer, config.prepend_bos) is not None


class Encode:
    """Encodes a document to tokens; can be pickled and sent to another process.

    Arguments:
        config: the text. Its `drop_tokens` do not count as real tokens, like special tokens.
        tokenizer: tokenizer of the language model.
        embeddings: number of rows of the model's embedding matrix, which ids may not exceed; None: unknown.

    Raises:
        ValueError: `drop_tokens` unknown to the tokenizer, chats but no chat template, or `prepend_bos: true` but no
            BOS.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, embeddings: int | None = None) -> None:
        self.tokenizer, self.embeddings = tokenizer, embeddings
        self.bos = bos_of(tokenizer, config.prepend_bos) if opens_with_bos(config, tokenizer) else None
        self.ends = config.rows == "packed"
        self.parse_special_tokens = config.parse_special_tokens
        self.cuts = Cuts(tokenizer, self.text_ids)
        vocabulary = tokenizer.get_vocab()
        self.size = max(vocabulary.values()) + 1
        for section, source in config.sections.items():
            if source.chat_field is not None and not tokenizer.chat_template:
                raise ValueError(
                    f"{section}.chat_field: got {source.chat_field!r}, but the tokenizer has no chat template; "
                    "use text_field, or a model trained on chats"
                )
        dropped = {_token_id(token, tokenizer, vocabulary, self.size) for token in config.drop_tokens}
        self.real = np.ones(self.size, bool)
        self.real[sorted(special_ids(tokenizer) | dropped)] = False

    def __call__(self, document: Document) -> Tokenized:
        """Encode a document; for a record that cannot be used, the result has no tokens and `bad` is set."""
        try:
            if document.form == "bad":
                raise BadRecord(document.content)
            ids = self._ids(document)
            self._check_embedded(ids, document.where)
        except BadRecord as error:
            if document.more or document.before:  # other pieces of the document are used
                raise
            return Tokenized(np.zeros(0, np.int32), np.zeros(0, bool), bad=str(error))
        real, eos = self.real[ids], self.tokenizer.eos_token_id
        if document.mask is not None:
            real &= document.mask
        # Chats and tokenised data may already end in EOS.
        ended = document.more or (document.form != "text" and len(ids) > 0 and ids[-1] == eos)
        if self.ends and eos is not None and not ended:
            ids, real = np.append(ids, np.asarray([eos], np.int32)), np.append(real, self.real[eos])
        return Tokenized(ids, real, document.more)

    def _check_embedded(self, ids: np.ndarray, where: str) -> None:
        if self.embeddings is not None and (ids >= self.embeddings).any():
            index = int(ids[ids >= self.embeddings][0])
            token = self.tokenizer.convert_ids_to_tokens(index)
            raise BadRecord(f"{where}: the token {token!r} {beyond(index, self.embeddings)}")

    def text_ids(self, text: str, parse_special_tokens: bool | None = None) -> list[int]:
        """A text's token ids, without added special tokens."""
        parse = self.parse_special_tokens if parse_special_tokens is None else parse_special_tokens
        return text_ids(self.tokenizer, text, parse)

    def _ids(self, document: Document) -> np.ndarray:
        content = document.content
        if document.form == "tokens":
            if content.min() < 0 or content.max() >= self.size:
                wrong = content[(content < 0) | (content >= self.size)][0]
                raise BadRecord(f"{document.where} has id {wrong}; the tokenizer's ids are 0 to {self.size - 1}")
            return content.astype(np.int32)
        if document.form == "chat":
            return self._chat(document)
        _check_characters(content, document.where)
        if document.before or len(content) <= 2 * PIECE:
            return self._piece(document.before, content)
        return np.concatenate(
            [self._piece(piece.before, piece.text) for piece in pieces(characters(content), self.cuts)]
        )

    def _piece(self, before: str, text: str) -> np.ndarray:
        """The tokens of a text that follows `before`."""
        ids = self.text_ids(before + text)
        if before:
            known = self.text_ids(before)
            if ids[: len(known)] != known:
                raise RuntimeError(f"the tokenizer encodes {before[-20:]!r} differently where a long text was cut")
            ids = ids[len(known) :]
        return np.asarray(ids, np.int32)

    def _chat(self, document: Document) -> np.ndarray:
        """The tokens of the rendered messages, without leading BOS, which rows add themselves."""
        try:
            text = self.tokenizer.apply_chat_template(document.content, tokenize=False)
        except Exception as error:  # templates are programs, which can raise anything
            raise BadRecord(f"{document.where}: the chat template rejects the messages: {error}") from error
        _check_characters(text, document.where)
        ids, bos = self.text_ids(text, True), self.tokenizer.bos_token_id
        start = 0
        while bos is not None and start < len(ids) and ids[start] == bos:
            start += 1
        return np.asarray(ids[start:], np.int32)


def text_ids(tokenizer: Any, text: str | list[str], parse_special_tokens: bool = False) -> Any:
    """Token ids of one or several texts. Special tokens spelled out in a text are parsed as such only on request."""
    return tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=not parse_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _check_characters(text: str, where: str) -> None:
    fault = surrogate_in(text)
    if fault is not None:
        raise BadRecord(f"{where} holds {fault}")


def _token_id(token: int | str, tokenizer: Any, vocabulary: dict[str, int], size: int) -> int:
    if isinstance(token, int):
        if not 0 <= token < size:
            raise ValueError(f"data.drop_tokens: got id {token}; the tokenizer's ids are 0 to {size - 1}")
        return token
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"data.drop_tokens: got {token!r}, which is {len(ids)} tokens; accepted: single tokens")
    return ids[0]


class Encoder:
    """Encodes sequences of documents; with loader processes, ahead of demand.

    Arguments:
        encode: encodes one document.
        workers: number of loader processes to spawn; 0: documents are encoded in this process, on demand.
    """

    def __init__(self, encode: Callable[[Document], Tokenized], workers: int = 0) -> None:
        self.encode, self.workers = encode, workers
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(encode,))

    def encoded(self, documents: Iterator[tuple[Document, Any]]) -> Iterator[tuple[Tokenized, Any]]:
        """The documents' tokens, each with the position that came with the document.

        Raises:
            ValueError: see `Encode`; also errors from reading, raised after all earlier documents were served.
            RuntimeError: a loader process died.
        """
        if self._pool is None:
            yield from ((self.encode(document), position) for document, position in documents)
            return
        waiting: deque[tuple[list[Any], Exception | None, Future[_Result]]] = deque()
        batches = _batches(documents)
        fault: Exception | None = None
        while fault is None:
            while len(waiting) < 2 * self.workers and (batch := next(batches, None)):
                read, reading = batch
                future = self._submit([document for document, _ in read])
                waiting.append(([position for _, position in read], reading, future))
            if not waiting:
                return
            positions, reading, future = waiting.popleft()
            try:
                found, encoding = future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "data.workers: a loader process died (was it killed, or out of memory?); with workers > 0 a script "
                    "must start its work under `if __name__ == '__main__':`"
                ) from error
            yield from zip(found, positions, strict=False)
            fault = encoding or reading
        raise fault

    def _submit(self, documents: list[Document]) -> Future[_Result]:
        # A new process inherits its parent's blocked signals. Otherwise Ctrl-C before `_begin` prints a traceback.
        before = _block_interrupts()
        try:
            assert self._pool is not None
            return self._pool.submit(_encode_batch, documents)
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Shut down the loader processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_Result = tuple[list[Tokenized], Exception | None]
"""Tokenized documents, and the error raised by the next one, if any."""


def _batches(
    documents: Iterator[tuple[Document, Any]],
) -> Iterator[tuple[Sequence[tuple[Document, Any]], Exception | None]]:
    """Batches of documents with their positions, and the error raised when reading further, if any."""
    while True:
        batch: list[tuple[Document, Any]] = []
        characters, fault = 0, None
        try:
            for item in itertools.islice(documents, _DOCUMENTS):
                batch.append(item)
                characters += 100 if item[0].form == "chat" else len(item[0].content)
                if characters >= _CHARACTERS:
                    break
        except Exception as error:
            fault = error
        if not batch and fault is None:
            return
        yield batch, fault
        if fault is not None:
            return


def _block_interrupts() -> set[Any] | None:
    if not hasattr(signal, "pthread_sigmask"):
        return None
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


_encode: Callable[[Document], Tokenized] | None = None  # set in loader processes


def _begin(encode: Callable[[Document], Tokenized]) -> None:
    """Set up this process as a loader: it ignores Ctrl-C, which the parent handles, and exits when the parent does."""
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism comes from the processes alone
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode = encode


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_batch(documents: list[Document]) -> _Result:
    assert _encode is not None
    found: list[Tokenized] = []
    for document in documents:
        try:
            found.append(_encode(document))
        except Exception as error:
            return found, error
    return found, None
