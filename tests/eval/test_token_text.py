"""Tokens shown to a reader: nothing is lost at the beginning, no character is broken."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from builders import TEXT, tiny_tokenizer
from c2r.eval.autointerp.windows import marked, plain
from c2r.eval.bench import TextActivations
from c2r.eval.splitting.cofiring import Cofiring
from c2r.eval.splitting.reading import snippets
from c2r.eval.token_text import shown, snippet


def sentence_piece(strip: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Blanks as ▁, characters beyond the vocabulary as bytes, the first blank stripped where text is decoded."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(parts + ([decoders.Strip(" ", 1, 0)] if strip else []))
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


BYTES, PIECES = tiny_tokenizer(), sentence_piece()
WRITTEN = "I like 😀 and мир, naïve 世界 here"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_a_snippet_is_the_text_around_a_token(tokenizer: Any, start: int, size: int, data: Any) -> None:
    ids = ids_of(tokenizer, WRITTEN)
    first = min(start, len(ids) - 1)
    last = min(first + size, len(ids) - 1)
    place = data.draw(st.integers(first, last))
    before, token, after = snippet(tokenizer, ids, place, first, last)
    assert before + token + after in " " + WRITTEN
    assert "\ufffd" not in before + token + after
    assert token
    # The token's own characters, by how many bytes stand before it and with it.
    if tokenizer is BYTES:
        whole, pieces = WRITTEN.encode(), [len(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
        begin, end = sum(pieces[:place]), sum(pieces[: place + 1])
        while whole[begin] & 0xC0 == 0x80:
            begin -= 1
        while end < len(whole) and whole[end] & 0xC0 == 0x80:
            end += 1
        assert token == whole[begin:end].decode()


def test_blanks_at_the_beginning_survive() -> None:
    ids = ids_of(PIECES, "The quick brown fox jumps")
    words = [n for n, piece in enumerate(PIECES.convert_ids_to_tokens(ids)) if piece.startswith("▁")]
    for first in words[1:]:
        rest = [later for later in words if later > first]
        before, token, after = snippet(PIECES, ids, first, first, len(ids) - 1)
        assert before == ""
        assert token.startswith(" ")
        assert after.count(" ") == len(rest)
        assert plain(PIECES, ids[first:]) == token + after


def test_pairs_to_read_show_both() -> None:
    ids = ids_of(PIECES, WRITTEN)
    emoji = next(n for n, piece in enumerate(PIECES.convert_ids_to_tokens(ids)) if piece == "<0xF0>")
    acts = torch.zeros(len(ids), 1)
    acts[emoji + 1] = 1.0  # a byte in the middle
    cofiring = Cofiring(torch.eye(1))
    cofiring.add(acts)
    rows = torch.zeros(len(ids), dtype=torch.long)
    text = TextActivations(torch.zeros(len(ids), 1), torch.tensor(ids), rows, torch.arange(len(ids)))
    (found,) = snippets(cofiring, 0, text, PIECES)
    assert found["token"] == "😀"
    assert found["before"] == " I like "
    assert found["after"].startswith(" ")
    assert "\ufffd" not in found["after"]
    assert marked(PIECES, ids, [n == emoji + 1 for n in range(len(ids))]) == " I like ⟦😀⟧" + WRITTEN.partition("😀")[2]


def test_what_a_row_does_not_have_is_left_out() -> None:
    ids = ids_of(BYTES, "a☃b☃c")
    assert snippet(BYTES, ids[2:-2], 2, 0, len(ids) - 5) == ("", "b", "")
    text, spans = shown(BYTES, ids)
    assert text == "a☃b☃c"
    assert spans == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (3, 4), (3, 4), (3, 4), (4, 5)]


def test_tokens_without_text() -> None:
    assert shown(BYTES, []) == ("", [])
    assert snippet(BYTES, [0], 0, 0, 0) == ("", "<|end|>", "")
