"""Long text in pieces: the same tokens as the whole text, the same pieces after resuming, and little memory."""

import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import c2r.text.files
import c2r.text.pieces
import c2r.text.tokenizing
from builders import TEXT, tiny_tokenizer
from c2r.config.text import DataConfig
from c2r.text.document import Document
from c2r.text.packing import packed_rows
from c2r.text.pieces import Cuts, characters, pieces
from c2r.text.tokenizing import Encode, text_ids

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXTRA = ["naïve", "мир", "こんにちは", "世界", "x1", "12345678", "don't", "…", "—", "<s>", "▁", "Ġ", "é", "😀"]
SMALL = 200
"""Length of a piece in these tests, in characters."""


def sample(seed: int, words: int = 900) -> str:
    """Words in several scripts, numbers, punctuation, runs of spaces and line breaks."""
    rng = random.Random(seed)
    known = [*TEXT.split(), *EXTRA]
    breaks = [" ", " ", " ", " ", "  ", "\n", "\n\n", ".\n", ". ", "\t", "\n    ", "\r\n", "\u00a0", "。\n"]
    return "".join(rng.choice(known) + rng.choice(breaks) for _ in range(words))


def trained(model: Any, trainer: Any, **parts: Any) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([sample(seed) for seed in range(40, 44)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def bpe(**options: Any) -> Any:
    return trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<|end|>"], show_progress=False, **options)


def byte_level(pre_tokenizer: Any, **parts: Any) -> transformers.PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(models.BPE(), bpe(initial_alphabet=alphabet), pre_tokenizer=pre_tokenizer,
                   decoder=decoders.ByteLevel(), **parts)  # fmt: skip


def llama2() -> transformers.PreTrainedTokenizerFast:
    """A converted SentencePiece BPE: inserts a space before the text, and no pre-tokenizer limits its merges."""
    bounded = trained(models.BPE(unk_token="<unk>"), bpe(), pre_tokenizer=pre_tokenizers.Metaspace())
    inner = bounded.backend_tokenizer
    inner.pre_tokenizer = None
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bounded


def split_by(pattern: str) -> Any:
    cuts = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def unigram(pre_tokenizer: Any, **parts: Any) -> transformers.PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<|end|>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizer, **parts)


def with_tokens(*added: AddedToken) -> transformers.PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(added))
    return tokenizer


TOKENIZERS = {
    "gpt2": tiny_tokenizer,
    "blank before": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: byte_level(split_by(LLAMA3)),
    "nfc": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC()),
    "digits": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "metaspace": lambda: trained(models.BPE(unk_token="<unk>"), bpe(), pre_tokenizer=pre_tokenizers.Metaspace()),
    "first": lambda: trained(
        models.BPE(unk_token="<unk>"), bpe(), pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "llama2": llama2,
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
    "unigram, nfkc, blanks made one": lambda: unigram(
        pre_tokenizers.Metaspace(),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
    ),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"),  # pyright: ignore[reportCallIssue]
        trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>", "<|end|>"], show_progress=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(),
    ),
    "added tokens": lambda: with_tokens(
        AddedToken("fox", rstrip=True), AddedToken("dog", lstrip=True), AddedToken("  ")
    ),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use pieces of a few hundred characters."""
    monkeypatch.setattr(c2r.text.pieces, "PIECE", SMALL)
    monkeypatch.setattr(c2r.text.tokenizing, "PIECE", SMALL)
    monkeypatch.setattr(c2r.text.pieces, "_STEP", 32)


def cuts_of(tokenizer: Any) -> Cuts:
    return Cuts(tokenizer, lambda text: text_ids(tokenizer, text))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(name: str, small: None) -> None:
    tokenizer = TOKENIZERS[name]()
    encode = Encode(DataConfig(), tokenizer)
    counts = []
    for seed in range(4):
        text = sample(seed)
        cut = list(pieces(characters(text), encode.cuts))
        counts.append(len(cut))
        assert "".join(piece.text for piece in cut) == text
        assert [piece.more for piece in cut] == [True] * (len(cut) - 1) + [False]
        whole = text_ids(tokenizer, text)
        joined = [
            token for piece in cut for token in encode(Document("text", piece.text, before=piece.before, more=True)).ids
        ]
        assert joined == whole
        assert encode(Document("text", text)).ids.tolist() == [*whole, *([tokenizer.eos_token_id])]
    assert min(counts) > 8  # it was cut


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_pieces_come_again_from_any_of_them_on(name: str, small: None) -> None:
    cuts = cuts_of(TOKENIZERS[name]())
    for seed in range(2):
        text = sample(seed)
        for length in (len(text), 700, 701, 702):
            whole = list(pieces(characters(text[:length]), cuts))
            for number, piece in enumerate(whole[:-1]):
                assert list(pieces(characters(text[:length]), cuts, piece.end)) == whole[number + 1 :]


def no_splitting() -> transformers.PreTrainedTokenizerFast:
    """Merges across spaces, as in tokenizers with tokens of several words."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, pre_tokenizer=splitter)


def counting_from_the_start() -> transformers.PreTrainedTokenizerFast:
    return byte_level(pre_tokenizers.Sequence(
        [pre_tokenizers.FixedLength(7), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ))  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        no_splitting,
        counting_from_the_start,
        lambda: unigram(pre_tokenizers.Metaspace(split=False)),
        lambda: (
            byte_level(pre_tokenizers.ByteLevel(False)) and with_tokens(AddedToken("over the"), AddedToken("\nThe"))
        ),
    ],
)
def test_what_cannot_be_cut_safely_stays_whole(make: Any, small: None) -> None:
    tokenizer = make()
    text = " ".join(TEXT.split()) * 30
    encode = Encode(DataConfig(), tokenizer)
    ids = [
        token
        for piece in pieces(characters(text), encode.cuts)
        for token in encode(Document("text", piece.text, before=piece.before, more=True)).ids
    ]
    assert ids == text_ids(tokenizer, text)


def test_tokenizers_that_are_not_understood_are_not_asked() -> None:
    class Letters:
        backend_tokenizer = None

    assert not Cuts(Letters(), lambda text: [1]).possible
    assert not cuts_of(counting_from_the_start()).possible
    assert not cuts_of(no_splitting()).possible
    dropping = tiny_tokenizer()
    dropping.backend_tokenizer.model = models.BPE(dropout=0.1)
    assert not cuts_of(dropping).possible
    assert cuts_of(tiny_tokenizer()).possible


def test_text_without_a_place_to_cut_stays_whole(small: None) -> None:
    cuts = cuts_of(tiny_tokenizer())
    for text in ("a" * 5000, " " * 5000, "1 2\n" * 1000, ""):
        assert [piece.text for piece in pieces(characters(text), cuts)] == ([text] if text else [])


def test_a_wrong_cut_is_found_out() -> None:
    encode, raised = Encode(DataConfig(), tiny_tokenizer()), 0
    for cut in range(10, 40):
        before, after, whole = TEXT[:cut], TEXT[cut:80], encode.text_ids(TEXT[:80])
        try:
            ids = encode(Document("text", after, before=before, more=True)).ids.tolist()
        except RuntimeError:
            raised += 1
        else:
            assert encode.text_ids(before) + ids == whole
    assert raised > 3


# Files


def write_long(folder: Path, files: int = 3) -> list[str]:
    texts = [sample(100 + number, 250 + 50 * number) for number in range(files)] + ["short", " \n "]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, newline="")
    return [text.replace("\r\n", "\n") for text in texts if text.strip()]


@pytest.mark.parametrize("changes", [{}, {"shuffle_documents": 2}, {"spelling_fraction": 0.0, "context": 23}])
def test_rows_of_long_files_are_those_of_whole_documents_and_resume(
    changes: dict[str, Any], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_long(tmp_path)
    tokenizer = tiny_tokenizer()
    config = DataConfig.model_validate({"source": "files", "path": str(tmp_path), "context": 16} | changes)
    cut = list(packed_rows(config, tokenizer, rows=2, seed=3, epochs=2))
    assert len({len(str(part.position)) for part in cut}) > 1
    for number in range(0, len(cut), 53):
        rest = list(packed_rows(config, tokenizer, rows=2, seed=3, epochs=2, start=cut[number].position))
        assert [part.position for part in rest] == [part.position for part in cut[number:]]
        assert all((a.ids == b.ids).all() and (a.real == b.real).all() for a, b in zip(rest, cut[number:], strict=True))
    monkeypatch.setattr(c2r.text.pieces, "PIECE", 10**9)
    monkeypatch.setattr(c2r.text.tokenizing, "PIECE", 10**9)
    whole = list(packed_rows(config, tokenizer, rows=2, seed=3, epochs=2))
    assert all((a.ids == b.ids).all() and (a.real == b.real).all() for a, b in zip(cut, whole, strict=True))
    real = [token for part in whole for token in part.ids[part.real].tolist()]
    assert sorted(real) == sorted(token for text in texts for token in 2 * text_ids(tokenizer, text))


def test_nothing_comes_in_between_the_pieces_of_a_document(tmp_path: Path, small: None) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_long(tmp_path / name, files=2)
    parts = [
        {"source": "files", "path": str(tmp_path / name), "weight": 1 + number} for number, name in enumerate("ab")
    ]
    config = DataConfig.model_validate({"source": "mixture", "parts": parts, "context": 16})
    tokenizer = tiny_tokenizer()
    rows = list(packed_rows(config, tokenizer, rows=2))
    flat = [token for part in rows for token in part.ids[:, 1:].flatten().tolist()]
    read = " ".join(map(str, flat))
    for text in write_long(tmp_path / "a", files=2):
        assert " ".join(map(str, text_ids(tokenizer, text))) in read
    for number in range(0, len(rows), 41):
        rest = list(packed_rows(config, tokenizer, rows=2, start=rows[number].position))
        assert all((a.ids == b.ids).all() for a, b in zip(rest, rows[number:], strict=True))


def test_shards_share_whole_documents(tmp_path: Path, small: None) -> None:
    texts = write_long(tmp_path, files=4)
    config = DataConfig(source="files", path=str(tmp_path), context=16)
    tokenizer = tiny_tokenizer()
    found = []
    for index in range(2):
        rows = list(packed_rows(config, tokenizer, rows=2, shard=(index, 2)))
        again = list(packed_rows(config, tokenizer, rows=2, shard=(index, 2), start=rows[5].position))
        assert all((a.ids == b.ids).all() for a, b in zip(again, rows[5:], strict=True))
        found.append(" ".join(str(token) for part in rows for token in part.ids[:, 1:].flatten().tolist()))
    for text in texts:
        assert sum(" ".join(map(str, text_ids(tokenizer, text))) in read for read in found) == 1


def test_a_long_file_is_read_no_further_than_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("".join(sample(seed) for seed in range(200)))
    size, read = (tmp_path / "a.txt").stat().st_size, []
    open_text = c2r.text.files.open_text

    def watched(*args: Any) -> Any:
        file, codec = open_text(*args)
        inner = file.read
        monkeypatch.setattr(c2r.text.files, "pieces", lambda _, *rest: pieces(lambda n: keep(inner(n)), *rest))
        return file, codec

    def keep(text: str) -> str:
        read.append(len(text))
        return text

    monkeypatch.setattr(c2r.text.files, "open_text", watched)
    next(packed_rows(DataConfig(source="files", path=str(tmp_path), context=16), tiny_tokenizer(), rows=4))
    assert 0 < sum(read) < 200_000 < size
