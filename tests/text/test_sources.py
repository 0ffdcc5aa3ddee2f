"""Sources of text: their configuration, and errors that name the place of anything that cannot be read."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from c2r.config.load import parse_config
from c2r.config.text import DataConfig
from c2r.text.sources import check_source, open_reader
from planted import records, write_parquet, write_planted, zstd

RUN = {"output": "x", "train": {"tokens": 100}, "saes": [{"name": "a", "width": 8, "k": 2}]}
FILES = {"source": "files", "path": "x"}
HF = {"source": "hf", "path": "x"}


def read_all(config: DataConfig) -> list[Any]:
    return [document.content for document, _ in open_reader("data", config).read(0)]


# The configuration


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"source": "web"}, r"source: got 'web'; accepted are stdlib, files, hf, mixture, synthetic"),
        ({"source": "hf"}, r"data: path: nothing given; source 'hf' needs one"),
        ({"text_field": "body"}, r"text_field: got 'body'; source 'stdlib' takes none, only files, hf"),
        (FILES | {"split": "test"}, r"split: got 'test'; source 'files' takes none, only hf"),
        (FILES | {"streaming": False}, r"streaming: got False; source 'files' takes none, only hf"),
        (FILES | {"chat_field": "a", "tokens_field": "b"}, r"tokens_field: given together with chat_field"),
        (FILES | {"text_field": "a", "chat_field": "b"}, r"chat_field: given together with text_field"),
        (FILES | {"mask_field": "m"}, r"mask_field: got 'm' without tokens_field"),
        (FILES | {"shuffle_documents": 0}, r"shuffle_documents: .*greater than or equal to 1 \(got 0\)"),
        (
            HF | {"streaming": False, "shuffle_documents": 9},
            r"not used with `streaming: false`, which shuffles the whole",
        ),
        (FILES | {"parts": [FILES, HF]}, r"parts: got .*; source 'files' takes none, only mixture"),
        ({"source": "mixture"}, r"parts: got 0; source 'mixture' needs two or more"),
        ({"source": "mixture", "path": "x", "parts": [FILES, HF]}, r"path: got 'x'; source 'mixture' takes none"),
        ({"source": "mixture", "parts": [FILES, {"source": "mixture"}]}, r"parts\.1: source: got 'mixture' within a m"),
        ({"source": "mixture", "parts": [FILES, HF | {"weight": 0}]}, r"data\.parts\.1\.weight: .*greater than 0"),
        (
            {"source": "mixture", "parts": [FILES, HF | {"wieght": 2}]},
            r"data\.parts\.1\.wieght: unknown key; accepted are .*weight; did you mean 'weight'",
        ),
        ({"drop_tokens": [1.5]}, r"data\.drop_tokens"),
        ({"drop_tokens": [True]}, r"data\.drop_tokens"),
        ({"workers": -1}, r"data\.workers: .*greater than or equal to 0"),
    ],
)
def test_faults_of_the_configuration_are_named(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_config(RUN | {"data": data}, "test")


def test_a_configuration_that_was_saved_whole_is_accepted() -> None:
    parts = [FILES | {"tokens_field": "ids", "mask_field": "m", "weight": 2.5}, HF | {"streaming": False}]
    for data in ({"source": "mixture", "parts": parts, "drop_tokens": [3, "the"]}, HF | {"revision": "v1"}, {}):
        config = DataConfig.model_validate(data)
        assert DataConfig.model_validate_json(config.model_dump_json()) == config


# Files


def good(count: int) -> bytes:
    return "".join(json.dumps({"text": f"{number} {random.Random(number).random()}"}) + "\n" for number in range(count)
                   ).encode()  # fmt: skip


def middle_byte_flipped(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(good(3000))[:-20_000],
            r"a\.jsonl\.gz cannot be read after line \d{3,4}: Compressed",
        ),
        (
            "a.jsonl.gz",
            middle_byte_flipped(gzip.compress(good(3000))),
            r"a\.jsonl\.gz(:| cannot be read after line) ?\d+",
        ),
        ("a.jsonl.gz", good(3), r"a\.jsonl\.gz cannot be read after line 0: Not a gzipped file"),
        ("a.jsonl.zst", zstd.compress(good(9000))[:-20_000], r"a\.jsonl\.zst cannot be read after line \d{3,4}: "),
        ("a.jsonl.zst", zstd.compress(good(10))[:-1], r"a\.jsonl\.zst cannot be read after line \d+: Compressed"),
        ("a.jsonl.zst", good(3), r"a\.jsonl\.zst cannot be read after line 0: "),
        ("a.jsonl", good(5)[:-9], r"data\.path: .*a\.jsonl:5 is not JSON"),
        ("a.jsonl", good(2) + b'{"text": "\xff"}\n', r"data\.path: .*a\.jsonl:3 is not UTF-8"),
        ("a.jsonl", good(2) + b"[1]\n", r"data\.path: .*a\.jsonl:3: expected a JSON object; found list"),
        ("a.jsonl", good(1) + b'{"text": 5}\n', r"data\.text_field: .*:2 has no text under 'text': found int: 5"),
        ("a.parquet", b"PAR1 not really", r"data\.path: .*a\.parquet cannot be read from row 0 on"),
    ],
)
def test_damaged_files_are_named_with_the_place(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_all(DataConfig(source="files", path=str(tmp_path / name)))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"text": os.urandom(300).hex()} for _ in range(200)]
    write_parquet(path, rows)
    assert sorted(read_all(DataConfig(source="files", path=str(path), held_out=0))) == sorted(
        row["text"] for row in rows
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read from row 0 on"):
        check_source(DataConfig(source="files", path=str(path), held_out=0))
    half = len(data) // 2
    path.write_bytes(data[: half - 3000] + bytes(6000) + data[half + 3000 :])  # whole pages are gone
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read from row \d\d+ onwards"):
        read_all(DataConfig(source="files", path=str(path), held_out=0))


CHATS: list[tuple[Any, str]] = [
    ("hello", r"has no list of messages under 'chat': found str"),
    ([{"role": "user"}], r"expected messages with 'role', a string, and 'content'; found \{'role': 'user'\}"),
    ([{"role": 1, "content": "x"}], r"expected messages with 'role'"),
    (["x"], r"expected messages with 'role'"),
]
TOKENS: list[tuple[Any, str]] = [
    ("hello", r"tokens_field: .* has no list of token ids under 'ids': found str"),
    ([1, 2.5], r"no list of token ids under 'ids': found list"),
    ([[1], [2]], r"no list of token ids under 'ids'"),
    ([[1], [2, 3]], r"no list of token ids under 'ids'"),
]
MASKS: list[tuple[Any, str]] = [
    ([1, 2], r"mask_field: .* has no list of 0 and 1 under 'mask'"),
    (None, r"no list of 0 and 1 under 'mask': found NoneType"),
    ([1], r"mask_field: .* has 2 tokens but a mask of length 1"),
]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("chat", *case) for case in CHATS] + [("ids", *case) for case in TOKENS] + [("mask", *case) for case in MASKS],
)
@pytest.mark.parametrize("source", ["files", "hf"])
def test_fields_of_another_type_are_named(source: str, field: str, value: Any, says: str, tmp_path: Path) -> None:
    record = {"chat": [{"role": "user", "content": "x"}], "ids": [1, 2], "mask": [1, 0]} | {field: value}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    path = tmp_path / "a.jsonl" if source == "files" else tmp_path
    form = {"chat_field": "chat"} if field == "chat" else {"tokens_field": "ids", "mask_field": "mask"}
    with pytest.raises(ValueError, match=says):
        check_source(DataConfig.model_validate({"source": source, "path": str(path)} | form))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("given", [{"source": "files"}, {"source": "hf"}, {"source": "hf", "streaming": False}])
def test_missing_fields_are_named(
    given: dict[str, Any], ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))  # pyright: ignore[reportAttributeAccessIssue]
    datasets.disable_progress_bars()
    write_planted(tmp_path / "data", ending, files=1)
    for form, says in (
        ({"text_field": "body"}, r"data(\.text_field)?: .*'body'.*(text, chat|'text', 'chat')"),
        ({"tokens_field": "ids", "mask_field": "use"}, r"data(\.mask_field)?: .*'use'.*(text, chat|'text', 'chat')"),
    ):
        config = DataConfig.model_validate({"path": str(tmp_path / "data")} | given | form)
        with pytest.raises(ValueError, match=says):
            check_source(config)


def test_faults_of_a_mixtures_part_name_the_part(tmp_path: Path) -> None:
    write_planted(tmp_path / "good")
    parts = [FILES | {"path": str(tmp_path / "good")}, FILES | {"path": str(tmp_path / "none")}]
    with pytest.raises(ValueError, match=r"data\.parts\.1\.path: no file matches"):
        check_source(DataConfig.model_validate({"source": "mixture", "parts": parts}))
    (tmp_path / "none").write_text("")
    (tmp_path / "none").rename(tmp_path / "empty.txt")
    parts[1]["path"] = str(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"data\.parts\.1\.path: .*empty\.txt holds no text"):
        check_source(DataConfig.model_validate({"source": "mixture", "parts": parts}))


def test_folders_and_globs(tmp_path: Path) -> None:
    write_planted(tmp_path / "a", "jsonl.gz", files=1)
    write_planted(tmp_path / "a" / "deep", "parquet", files=1)
    (tmp_path / "a" / "README.md").write_text("passed over")
    (tmp_path / "a" / "crlf.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": " "}\r\n{"text": "two"}')
    config = DataConfig(source="files", path=str(tmp_path / "a"))
    assert len(read_all(config)) == 122
    assert read_all(DataConfig(source="files", path=str(tmp_path / "a" / "*.jsonl"))) == ["one", "two"]
    assert len(read_all(DataConfig(source="files", path=str(tmp_path / "**" / "*.parquet")))) == 60
    with pytest.raises(ValueError, match=r"README\.md ends in '\.md'; accepted are \.txt, \.jsonl, .* and \.parquet"):
        check_source(DataConfig(source="files", path=str(tmp_path / "a" / "*")))


# Data sets


def test_saved_data_sets_have_splits(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    rows = records([["aaa", "aab"], ["aac"]])
    sets = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(sets).save_to_disk(tmp_path)
    for streaming in (False, True):
        config = DataConfig(source="hf", path=str(tmp_path), split="test", streaming=streaming)
        assert read_all(config) == [" aaa aab"]
        with pytest.raises(ValueError, match=r"cannot open data set .*split 'validation': its splits are train, tes"):
            check_source(config.model_copy(update={"split": "validation"}))


def test_a_data_set_of_files_is_shuffled_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))  # pyright: ignore[reportAttributeAccessIssue]
    datasets.disable_progress_bars()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(500)))
    config = DataConfig(source="hf", path=str(tmp_path / "data"), streaming=False, held_out=0)
    order = [int(text) for text in read_all(config)]
    assert sorted(order) == list(range(500))
    assert max(order[:50]) > 400 > 100 > min(order[:50])


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-100]])
def test_damaged_files_of_a_data_set_are_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(good(3000))))
    with pytest.raises(ValueError, match=r"data\.path: cannot (continue in|open data set)"):
        read_all(DataConfig(source="hf", path=str(tmp_path)))
