"""Decoding: certain encodings are read, others refused with file, place and key; skipped bad records are counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from builders import tiny_tokenizer
from c2r.config.load import parse_config
from c2r.config.text import DataConfig
from c2r.text import stdlib as stdlib_text
from c2r.text.packing import Skipped, packed_rows
from c2r.text.sources import check_source, open_reader
from planted import WORDS, documents, planted_tokenizer, records, write_parquet, write_planted, zstd

RUN = {"output": "x", "train": {"tokens": 100}, "saes": [{"name": "a", "width": 8, "k": 2}]}
WORDED = "Größe, naïve – “мир”\nsecond line, 世界 😀\n"
LINES = [{"text": WORDED}, {"text": "two\n"}, {"text": "ਊ ఊ \u0a0a"}]  # characters whose UTF-16 bytes contain 0x0a
PACK: dict[str, Any] = {".jsonl": lambda data: data, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd.compress}


def config_of(path: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "files", "path": str(path)} | changes)


def read_all(config: DataConfig) -> list[Any]:
    return [document.content for document, _ in open_reader("data", config).read(0)]


MARKED = ["utf-8-sig", "utf-16", "utf-32"]
NAMED = ["utf-16-le", "utf-16-be", "utf-32-be", "utf-7", "utf-8", "gb18030", "UTF8"]


@pytest.mark.parametrize("encoding", [*MARKED, *NAMED, "big-endian"])
@pytest.mark.parametrize("given", [True, False])
def test_text_and_lines_in_every_encoding(encoding: str, given: bool, tmp_path: Path) -> None:
    def write(text: str) -> bytes:
        return (
            "\ufeff".encode("utf-16-be") + text.encode("utf-16-be")
            if encoding == "big-endian"
            else text.encode(encoding)
        )

    marked = encoding in (*MARKED, "big-endian")
    if not given and not marked and encoding.lower() not in ("utf-8", "utf8"):
        return  # test_what_is_not_certain_is_refused
    changes = {"encoding": "cp1252" if marked else encoding} if given else {}  # a byte order mark decides
    (tmp_path / "a.txt").write_bytes(write(WORDED.replace("\n", "\r\n")))
    assert read_all(config_of(tmp_path / "a.txt", **changes)) == [WORDED]
    for ending, pack in PACK.items():
        path = tmp_path / f"a{ending}"
        path.write_bytes(pack(write("\r\n".join(json.dumps(line, ensure_ascii=False) for line in LINES))))
        config = config_of(path, **changes)
        assert read_all(config) == [line["text"] for line in LINES]
        for document, position in open_reader("data", config).read(0):
            rest = [after.content for after, _ in open_reader("data", config).read(0, position())]
            assert (
                rest == [line["text"] for line in LINES][[line["text"] for line in LINES].index(document.content) + 1 :]
            )


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp037"])
def test_named_encodings_of_one_byte(encoding: str, tmp_path: Path) -> None:
    text = "Größe, naïve\n" if encoding == "cp037" else "Größe, naïve\nsecond"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_all(config_of(tmp_path / "a.txt", encoding=encoding)) == [text]
    (tmp_path / "a.jsonl").write_bytes(
        ("\n".join([json.dumps({"text": text}, ensure_ascii=False)] * 2)).encode(encoding)
    )
    assert read_all(config_of(tmp_path / "a.jsonl", encoding=encoding)) == [text] * 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            "Grün\nGröße".encode("latin-1"),
            r"a\.txt:1 is not UTF-8: byte 0xfc at offset 2; .*data\.encoding, for example",
        ),
        (b"one\ntwo\n\xe9", r"a\.txt:3 is not UTF-8: byte 0xe9 at offset 8"),
        (b"x" * 3_000_000 + b"\n\xff", r"a\.txt:2 is not UTF-8: byte 0xff at offset 3,000,001"),
        ("é".encode()[:1], r"a\.txt:1 is not UTF-8: byte 0xc3 at offset 0"),
        ("héllo wörld".encode("utf-16-le"), r"looks like UTF-16-LE .*data\.encoding: utf-16-le"),
        ("hi".encode("utf-16-be"), r"looks like UTF-16-BE"),
        (("Мир и война. " * 40).encode("utf-16-le"), r"looks like UTF-16-LE"),
        (WORDED.encode("utf-32-le"), r"looks like UTF-32-LE"),
        (b"\xff\xfea\0b", r"a\.txt:1 is not UTF-16-LE: byte 0x62 at offset 4"),
    ],
)
def test_what_is_not_certain_is_refused(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_all(config_of(tmp_path / "a.txt"))
    if "looks" in says:
        (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
        with pytest.raises(ValueError, match=says):
            read_all(config_of(tmp_path / "a.jsonl"))


def test_a_wrong_byte_in_a_line_is_placed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is not UTF-8: byte 0xe9 at offset 27; .*data\.encoding"):
        read_all(config_of(tmp_path / "a.jsonl"))
    found = list(open_reader("data", config_of(tmp_path / "a.jsonl", bad_records="skip")).read(0))
    assert [document.form for document, _ in found] == ["text", "bad"]


def test_text_that_utf_8_allows_is_left_as_it_is(tmp_path: Path) -> None:
    text = "a\0b \ufffd\u2028c\x85d\x0ce"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_all(config_of(tmp_path / "a.txt")) == [text]
    (tmp_path / "a.txt").write_text("a\rb\r\nc\n", newline="")
    assert read_all(config_of(tmp_path / "a.txt")) == ["a\nb\nc\n"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 3_000_000 + text}) + "\n")
    assert read_all(config_of(tmp_path / "a.jsonl")) == ["x" * 3_000_000 + text]


@pytest.mark.parametrize("encoding", ["utf-88", "rot13", "base64", "undefined", ""])
def test_encodings_that_are_none_are_named(encoding: str) -> None:
    data = {"source": "files", "path": "x", "encoding": encoding}
    with pytest.raises(ValueError, match=r"encoding: got .*; accepted are null \(UTF-8\) and"):
        parse_config(RUN | {"data": data}, "test")
    with pytest.raises(ValueError, match="encoding: got 'utf-8'; source 'stdlib' takes none, only files"):
        parse_config(RUN | {"data": {"encoding": "utf-8"}}, "test")


def test_python_files_are_read_as_they_declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'Grün'\n".encode("latin-1"))
    monkeypatch.setattr(stdlib_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(stdlib_text.stdlib_documents()) == ["# -*- coding: latin-1 -*-\nname = 'Grün'\n"]
    (tmp_path / "a.py").write_bytes("name = 'Grün'\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"'stdlib' cannot read .*a\.py"):
        list(stdlib_text.stdlib_documents())


# Bad records

SURROGATE = '{"text": "broken \\ud83d emoji"}'
BAD = [
    (
        SURROGATE,
        r"data\.text_field: .*:3 holds half of a surrogate pair .*, not a valid character\) at character 7",
    ),
    ("oops", r"data\.path: .*:3 is not JSON \(Expecting value at character 0\)"),
    ('{"text": "a"} x', r":3 is not JSON \(Extra data at character 14\)"),
    ("[1]", r":3: expected a JSON object; found list"),
    ('"text"', r":3: expected a JSON object; found str"),
    ("null", r":3: expected a JSON object; found NoneType"),
    ('{"body": "a"}', r"data\.text_field: .*:3 has no text under 'text'; its fields are: body"),
    ('{"text": null}', r":3 has no text under 'text': found NoneType"),
    ('{"text": ["a"]}', r":3 has no text under 'text': found list"),
    ('{"text": ' + "9" * 5000 + "}", r":3 cannot be parsed as JSON \(Exceeds the limit"),
    ("[" * 200_000, r":3 cannot be parsed as JSON"),
    ("\0\0\0", r":3 is not JSON"),
]


@pytest.mark.parametrize(("bad", "says"), BAD)
def test_bad_records_are_named_or_skipped(bad: str, says: str, tmp_path: Path) -> None:
    good = [f'{{"text": "{word}"}}' for word in ("one", "two", "three", "four")]
    (tmp_path / "t.jsonl").write_text("\n".join([*good[:2], bad, *good[2:], bad]) + "\n")
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=says):
        list(packed_rows(config_of(tmp_path, context=8), tokenizer))
    said: list[str] = []
    skipped = Skipped(said.append)
    rows = list(packed_rows(config_of(tmp_path, context=8, bad_records="skip"), tokenizer, epochs=2, skipped=skipped))
    text = tokenizer.decode([token for part in rows for token in part.ids[part.real].tolist()])
    assert text == "onetwothreefour" * 2
    assert skipped.count == 4
    assert skipped.report == "bad records skipped: 4"
    assert len(said) == 1
    assert ":3" in said[0]


def test_the_count_survives_resuming(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in records(documents())]
    for number in range(0, 60, 4):
        lines.insert(number, "oops")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for changes in ({}, {"shuffle_documents": 8}):
        config, tokenizer = config_of(tmp_path, context=11, bad_records="skip", **changes), planted_tokenizer()
        counted = Skipped()
        whole = list(packed_rows(config, tokenizer, rows=3, epochs=2, skipped=counted))
        assert counted.count == 30
        for number in (0, 5, len(whole) // 2, len(whole) - 1):
            again = Skipped()
            start = json.loads(json.dumps(whole[number].position))
            rest = list(packed_rows(config, tokenizer, rows=3, epochs=2, start=start, skipped=again))
            assert again.count == 30
            assert all((a.ids == b.ids).all() for a, b in zip(rest, whole[number:], strict=True))
        config = config.model_copy(update={"workers": 1})
        counted = Skipped()
        list(packed_rows(config, tokenizer, rows=3, skipped=counted))
        assert counted.count == 15


def test_what_only_the_tokenizer_knows_to_be_bad(tmp_path: Path) -> None:
    tokenizer = planted_tokenizer()
    (tmp_path / "a.jsonl").write_text('{"ids": [5]}\n{"ids": [5, 2004]}\n{"ids": [7]}\n')
    config = config_of(tmp_path, tokens_field="ids", context=8, bad_records="skip")
    skipped = Skipped()
    (part,) = packed_rows(config, tokenizer, skipped=skipped)
    assert part.ids[part.real].tolist() == [5, 7]
    assert skipped.count == 1
    chats = [[{"role": "user", "content": text}] for text in (" aaa", "\ud83d", " aab")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    with pytest.raises(ValueError, match=r"data\.chat_field: .*a\.jsonl:2 holds half of a surrogate pair"):
        list(packed_rows(config_of(tmp_path, chat_field="chat", context=8), tokenizer))
    (part,) = packed_rows(config_of(tmp_path, chat_field="chat", context=8, bad_records="skip"), tokenizer)
    assert [WORDS[token - 3] for token in part.ids[part.real].tolist()] == ["aaa", "aab"]


def test_bytes_in_parquet_that_are_no_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "one"}])
    raw = pyarrow.array([b"one", b"\xff\xfe", b"three"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data\.path: .*a\.parquet, row 1 is not UTF-8"):
        read_all(config_of(tmp_path))
    assert [d for d in read_all(config_of(tmp_path, bad_records="skip")) if "UTF-8" not in d] == ["one", "three"]


def test_a_data_set_skips_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    config = DataConfig(source="hf", path=str(tmp_path), context=8)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="has no text under 'text': found NoneType"):
        list(packed_rows(config, tokenizer))
    skipped = Skipped()
    list(packed_rows(config.model_copy(update={"bad_records": "skip"}), tokenizer, skipped=skipped))
    assert skipped.count == 1


def test_nothing_but_bad_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\ny\n")
    config = config_of(tmp_path, bad_records="skip")
    with pytest.raises(
        ValueError, match=r"holds no text; all records were skipped; the first error: .*a\.jsonl:1 is not JSON"
    ):
        check_source(config)
    with pytest.raises(ValueError, match="nothing to train on; 2 records were skipped"):
        list(packed_rows(config, tiny_tokenizer()))


def test_training_says_what_it_skipped(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    from builders import run_config
    from c2r.training.trainer import train

    write_planted(tmp_path / "text")
    with (tmp_path / "text" / "0.jsonl").open("a") as file:
        file.write(SURROGATE + "\n")
    data = {"source": "files", "path": str(tmp_path / "text"), "context": 16, "bad_records": "skip"}
    with (tmp_path / "said").open("w") as out:
        config = run_config(
            tmp_path / "run", tiny_models["llama"], corpus, data=data, train={"tokens": 256, "batch": 64}
        )
        train(config, console=Console(file=out, width=400))
    said = (tmp_path / "said").read_text()
    assert "skipped a bad record: data.text_field" in said
    assert "bad records skipped: " in said
