"""A corpus of unique words, each one token, so that a test can count where every token went."""

import gzip
import itertools
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from c2r.text.files import zstd_module

WORDS = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)][:2000]
zstd = zstd_module()
CHAT = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"


def planted_tokenizer(bos: bool = True, chat: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A token a word after a space; `<|turn|>` is special without being one of BOS, EOS, padding, unknown."""
    vocabulary = {"<|unk|>": 0, "<|end|>": 1, "<|bos|>": 2} | {f"Ġ{word}": i for i, word in enumerate(WORDS, 3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<|unk|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, **({"bos_token": "<|bos|>"} if bos else {})
    )
    fast.add_tokens([AddedToken("<|turn|>", special=True, normalized=False)])
    if chat:
        fast.chat_template = CHAT
    return fast


def documents(count: int = 60, first: int = 0) -> list[list[str]]:
    """Documents of 1 to 20 words, no word twice."""
    words = iter(WORDS[first:])
    return [list(itertools.islice(words, 1 + 7 * number % 20)) for number in range(count)]


def records(docs: list[list[str]]) -> list[dict[str, Any]]:
    """The documents in each form that a record may have."""
    ids = {word: i for i, word in enumerate(WORDS, 3)}
    return [
        {
            "text": "".join(f" {word}" for word in doc),
            "chat": [
                {"role": "user", "content": f" {doc[0]}"},
                {"role": "assistant", "content": "".join(f" {word}" for word in doc[1:])},
            ],
            "ids": [ids[word] for word in doc],
            "mask": [int(number % 3 > 0) for number in range(len(doc))],
        }
        for doc in docs
    ]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


WRITE: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    # Two frames, as parallel compressors write them.
    "jsonl.zst": lambda path, rows: path.write_bytes(zstd.compress(lines(rows[:9])) + zstd.compress(lines(rows[9:]))),
    "parquet": write_parquet,
}


def write_planted(folder: Path, ending: str = "jsonl", docs: list[list[str]] | None = None, files: int = 3) -> Path:
    """The documents in several files of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = records(docs or documents())
    for number in range(files):
        part = rows[number::files]
        if ending == "txt":
            for index, row in enumerate(part):
                (folder / f"{number}-{index}.txt").write_text(row["text"])
        else:
            WRITE[ending](folder / f"{number}.{ending}", part)
    return folder
