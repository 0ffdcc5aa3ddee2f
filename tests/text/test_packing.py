"""Packed rows: every planted token exactly once, for workers, shards and mixtures; resuming changes nothing."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import c2r.text.files
import c2r.text.hub
import c2r.text.tokenizing
from c2r.config.text import DataConfig
from c2r.text.packing import Rows, packed_rows
from planted import WORDS, documents, planted_tokenizer, write_planted

ALL = Counter(itertools.chain.from_iterable(documents()))


def real_words(rows: list[Rows]) -> Counter[str]:
    return Counter(WORDS[token - 3] for part in rows for token in part.ids[part.real].tolist())


def same(first: list[Rows], second: list[Rows]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.ids, b.ids) and torch.equal(a.real, b.real) and a.position == b.position
        for a, b in zip(first, second, strict=True)
    )


SOURCES: dict[str, dict[str, Any]] = {
    "txt": {"source": "files"},
    "jsonl": {"source": "files"},
    "jsonl.gz": {"source": "files"},
    "jsonl.zst": {"source": "files"},
    "parquet": {"source": "files"},
    "jsonl in windows": {"source": "files", "shuffle_documents": 16},
    "jsonl of chats": {"source": "files", "chat_field": "chat"},
    "parquet of chats": {"source": "files", "chat_field": "chat"},
    "jsonl of tokens": {"source": "files", "tokens_field": "ids"},
    "parquet of tokens": {"source": "files", "tokens_field": "ids"},
    "parquet streamed": {"source": "hf", "shuffle_documents": 16},
    "jsonl streamed": {"source": "hf"},
    "jsonl streamed one by one": {"source": "hf", "shuffle_documents": 1, "tokens_field": "ids"},
    "saved": {"source": "hf", "streaming": False},
    "saved of chats": {"source": "hf", "streaming": False, "chat_field": "chat"},
    "saved streamed": {"source": "hf", "shuffle_documents": 7, "tokens_field": "ids"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted documents in every file format."""
    root = tmp_path_factory.mktemp("planted")
    for ending in ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        write_planted(root / ending, ending)
    datasets.disable_progress_bars()
    rows = [json.loads(line) for path in sorted((root / "jsonl").iterdir()) for line in path.read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(root / "saved")
    return root


def config_of(kind: str, folder: Path, **changes: Any) -> DataConfig:
    given = {"path": str(folder / kind.split()[0]), "context": 11} | SOURCES[kind] | changes
    return DataConfig.model_validate(given)


def mixture(folder: Path, *kinds: str, **changes: Any) -> DataConfig:
    parts = [
        {"path": str(folder / kind.split()[0]), "weight": 1 + number} | SOURCES[kind]
        for number, kind in enumerate(kinds)
    ]
    return DataConfig.model_validate({"source": "mixture", "parts": parts, "context": 11} | changes)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_planted_token_comes_once_and_going_on_equals_never_stopping(kind: str, folder: Path) -> None:
    config, tokenizer = config_of(kind, folder), planted_tokenizer()
    once = list(packed_rows(config, tokenizer, rows=3, seed=5))
    assert real_words(once) == ALL
    whole = list(packed_rows(config, tokenizer, rows=3, seed=5, epochs=2))
    assert real_words(whole) == ALL + ALL
    assert len(whole) > 30
    for number in (0, 1, 7, len(once) - 1, len(once), len(whole) - 1):
        start = json.loads(json.dumps(whole[number].position))
        rest = list(packed_rows(config, tokenizer, rows=3, seed=5, epochs=2, start=start))
        assert same(rest, whole[number:])
    # Also with another batch size; both epochs end in padding.
    start = whole[4].position
    rest = list(packed_rows(config, tokenizer, rows=2, seed=5, start=start))
    assert torch.equal(torch.cat([part.ids for part in rest]), torch.cat([part.ids for part in once[4:]]))


@pytest.mark.parametrize("kind", SOURCES)
def test_the_seed_decides_the_order(kind: str, folder: Path) -> None:
    tokenizer = planted_tokenizer()
    first, again, other = (
        torch.cat([part.ids for part in packed_rows(config_of(kind, folder), tokenizer, seed=seed)])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "jsonl in windows", "parquet streamed", "saved"])
def test_shards_share_the_documents(kind: str, folder: Path) -> None:
    config, tokenizer = config_of(kind, folder), planted_tokenizer()
    parts = [list(packed_rows(config, tokenizer, seed=2, rows=2, shard=(index, 3))) for index in range(3)]
    assert sum(map(real_words, parts), Counter()) == ALL
    assert all(real_words(part) for part in parts)
    again = list(packed_rows(config, tokenizer, seed=2, rows=2, shard=(1, 3), start=parts[1][2].position))
    assert same(again, parts[1][2:])
    with pytest.raises(ValueError, match=r"shard was \[1, 3\] and is now \[2, 3\]"):
        next(packed_rows(config, tokenizer, seed=2, shard=(2, 3), start=parts[1][2].position))


def test_a_shard_without_documents_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds no text in shard 60 of 61"):
        list(packed_rows(config_of("jsonl", folder), planted_tokenizer(), shard=(60, 61)))


class Counted(transformers.PreTrainedTokenizerFast):
    """Counts the texts that it encodes."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    "kind", ["jsonl", "parquet", "jsonl in windows", "parquet streamed", "saved", "jsonl of chats"]
)
def test_going_on_tokenises_nothing_twice(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = planted_tokenizer()
    monkeypatch.setattr(Counted, "calls", 0)
    tokenizer.__class__ = Counted
    config = config_of(kind, folder)
    whole = list(packed_rows(config, tokenizer, rows=2))
    assert Counted.calls == 60
    read = Counter()
    for module in (c2r.text.files, c2r.text.hub):
        convert = module.as_document
        monkeypatch.setattr(
            module, "as_document", lambda *args, convert=convert: (read.update(["document"]), convert(*args))[1]
        )
    for number in (0, 10, len(whole) - 1):
        Counted.calls = 0
        read.clear()
        next(packed_rows(config, tokenizer, rows=2, start=whole[number].position))
        # Documents in these rows: one more than ends.
        ends = int((whole[number].ids[:, 1:] == tokenizer.eos_token_id).sum())  # pyright: ignore[reportAttributeAccessIssue]
        assert 0 < Counted.calls <= ends + 1
        assert read["document"] <= (16 if config.shuffle_documents else ends + 1 if kind != "saved" else 60) + 16


def test_plain_lines_are_skipped_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("jsonl", folder)
    whole = list(packed_rows(config, planted_tokenizer(), rows=2))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(c2r.text.files.json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    list(packed_rows(config, planted_tokenizer(), rows=2, start=whole[-1].position))
    assert 0 < len(parsed) <= 4


def test_spelling_lists_go_on_too(folder: Path) -> None:
    config, tokenizer = config_of("jsonl", folder, spelling_fraction=0.4), planted_tokenizer()
    whole = list(packed_rows(config, tokenizer, rows=3, epochs=3))
    listed = 3 * (real_words(whole).total() - 3 * ALL.total())  # lists of break, word and letter, words spelt in some
    assert listed / (listed + 3 * (ALL.total() + 60)) == pytest.approx(0.4, abs=0.06)
    for number in range(0, len(whole), 9):
        assert same(
            list(packed_rows(config, tokenizer, rows=3, epochs=3, start=whole[number].position)), whole[number:]
        )
    before, tokenizer.__class__ = Counted.calls, Counted
    next(packed_rows(config, tokenizer, rows=3, epochs=3, start=whole[-1].position))
    assert 0 < Counted.calls - before < 10


# Mixtures


def test_a_mixture_keeps_its_weights_and_goes_on(folder: Path, tmp_path: Path) -> None:
    write_planted(tmp_path / "jsonl", docs=documents(50, first=1000))
    tokenizer = planted_tokenizer()
    parts = [
        {"source": "files", "path": str(folder / "jsonl"), "weight": 3},
        {"source": "hf", "path": str(tmp_path / "jsonl"), "weight": 1, "tokens_field": "ids", "shuffle_documents": 4},
    ]
    config = DataConfig.model_validate({"source": "mixture", "parts": parts, "context": 11})
    whole = list(packed_rows(config, tokenizer, rows=4, seed=1))
    first, second = Counter(), Counter()
    for part in whole:
        for row in part.ids[:, 1:].flatten().tolist():
            if row >= 3:
                (first if WORDS[row - 3] in ALL else second).update([WORDS[row - 3]])
    # A document has at most 20 words and EOS; one part can be ahead of the other by that many tokens.
    assert abs(first.total() / 3 - second.total()) < 60
    # The mixture ends when its last part does, here the second; the first is already in its next pass.
    assert set(second.values()) == {1}
    assert len(second) == len(set(itertools.chain.from_iterable(documents(50, first=1000))))
    assert set(first.values()) == {2, 3}
    for number in range(0, len(whole), 17):
        assert same(list(packed_rows(config, tokenizer, rows=4, seed=1, start=whole[number].position)), whole[number:])
    endless = list(itertools.islice(packed_rows(config, tokenizer, rows=4, seed=1, epochs=None), len(whole) + 5))
    assert same(endless[: len(whole) - 1], whole[:-1])
    assert all(part.real[:, 1:].any(1).all() for part in endless)


# Filters


def test_special_and_dropped_tokens_and_the_users_mask(folder: Path) -> None:
    tokenizer = planted_tokenizer()
    dropped = documents()[5]
    drop_tokens = [f" {dropped[0]}", f"Ġ{dropped[1]}", tokenizer.get_vocab()[f"Ġ{dropped[2]}"]]
    chats = list(packed_rows(config_of("jsonl of chats", folder, drop_tokens=drop_tokens), tokenizer))
    assert real_words(chats) == ALL - Counter(dropped[:3])
    ids = torch.cat([part.ids.flatten() for part in chats])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn not in tokenizer.all_special_ids
    assert (ids == turn).sum() == 120  # the model reads them  # pyright: ignore[reportAttributeAccessIssue]
    assert {3 + WORDS.index(word) for word in dropped[:3]} <= set(ids.tolist())
    masked = list(packed_rows(config_of("jsonl of tokens", folder, mask_field="mask"), tokenizer))
    assert real_words(masked) == Counter(word for doc in documents() for n, word in enumerate(doc) if n % 3 > 0)
    unmasked = list(packed_rows(config_of("jsonl of tokens", folder), tokenizer))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(masked, unmasked, strict=True))


def test_ends_are_not_doubled(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [4, 5, 6, 1]}\n{"ids": [7, 8]}\n{"ids": [1, 9]}\n')
    config = DataConfig(source="files", path=str(tmp_path), tokens_field="ids", context=16)
    (part,) = packed_rows(config, planted_tokenizer(bos=False))
    assert part.ids[0, :10].tolist() == [4, 5, 6, 1, 7, 8, 1, 1, 9, 1]
    assert part.real[0].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 8]


@pytest.mark.parametrize(
    ("kind", "changes", "chat", "says"),
    [
        ("jsonl", {"drop_tokens": [5000]}, True, r"data\.drop_tokens: got id 5000; the tokenizer's ids are 0 to 2003"),
        ("jsonl", {"drop_tokens": [" aaa aab"]}, True, r"data\.drop_tokens: got ' aaa aab', which is 2 tokens"),
        ("jsonl of chats", {}, False, r"data\.chat_field: got 'chat', but the tokenizer has no chat template"),
        ("txt", {"source": "files", "chat_field": "chat"}, True, r"data\.path: .*txt is plain text"),
    ],
)
def test_what_does_not_fit_the_tokenizer_is_named_before_reading(
    kind: str, changes: dict[str, Any], chat: bool, says: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        packed_rows(config_of(kind, folder, **changes), planted_tokenizer(chat=chat))


def test_ids_and_messages_that_do_not_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [5]}\n{"ids": [5, 2004]}\n')
    config = DataConfig(source="files", path=str(tmp_path), tokens_field="ids")
    with pytest.raises(ValueError, match=r"data\.tokens_field: .*a\.jsonl:2 has id 2004; .* 0 to 2003"):
        list(packed_rows(config, planted_tokenizer()))
    (tmp_path / "a.jsonl").write_text('{"chat": [{"role": "user", "content": "x"}]}\n')
    tokenizer = planted_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    config = DataConfig(source="files", path=str(tmp_path), chat_field="chat")
    with pytest.raises(ValueError, match=r"chat_field: .*a\.jsonl:1: the chat template .*roles must alternate"):
        list(packed_rows(config, tokenizer))


def test_a_position_in_other_text_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = planted_tokenizer()
    write_planted(tmp_path)
    config = DataConfig(source="files", path=str(tmp_path), context=11)
    position = next(packed_rows(config, tokenizer, seed=3)).position
    with pytest.raises(ValueError, match="the seed was 3 and is now 4"):
        next(packed_rows(config, tokenizer, seed=4, start=position))
    (tmp_path / "new.txt").write_text("more")
    with pytest.raises(ValueError, match=r"the text was \['3 files .* and is now \['4 files"):
        next(packed_rows(config, tokenizer, seed=3, start=position))


# Loader processes


def test_rows_do_not_depend_on_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c2r.text.tokenizing, "_DOCUMENTS", 7)
    tokenizer = planted_tokenizer()
    config = mixture(folder, "jsonl", "parquet of chats", spelling_fraction=0.2)
    alone = list(packed_rows(config, tokenizer, rows=4, seed=1))
    together = config.model_copy(update={"workers": 2})
    assert len(alone) > 30
    assert same(list(packed_rows(together, tokenizer, rows=4, seed=1, start=alone[5].position)), alone[5:])


def test_workers_report_faults_after_the_rows_before_them(tmp_path: Path) -> None:
    good = "".join(f'{{"ids": [{3 + number}]}}\n' for number in range(300))
    for bad, says in (('{"ids": [9999]}\n', "a.jsonl:301 has id 9999"), ("oops\n", "a.jsonl:301 is not JSON")):
        (tmp_path / "a.jsonl").write_text(good + bad + good)
        seen = []
        for workers in (0, 1):
            config = DataConfig(source="files", path=str(tmp_path), tokens_field="ids", context=11, workers=workers)
            rows: list[Rows] = []
            with pytest.raises(ValueError, match=says):
                rows.extend(packed_rows(config, planted_tokenizer(), rows=2))
            seen.append(rows)
        assert same(*seen)


READING = """
import itertools, multiprocessing, time
import numpy as np
from c2r.text import tokenizing as encode
from c2r.text.document import Document

def length(document):
    return encode.Tokenized(np.array([len(document.content)]), np.array([True]))

if __name__ == "__main__":
    documents = ((Document("text", "x" * 9000), number) for number in itertools.count())
    for encoded, number in encode.Encoder(length, 2).encoded(documents):
        assert encoded.ids[0] == 9000
        if number == 40:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(0.001)
"""


def test_workers_ignore_ctrl_c_and_die_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "reading.py"
    script.write_text(READING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        try:
            assert parent.stdout is not None
            workers = [int(word) for word in parent.stdout.readline().split()]
            assert len(workers) == 2
            for worker in workers:
                os.kill(worker, signal.SIGINT)
            time.sleep(0.3)
            assert parent.poll() is None
            assert all(alive(worker) for worker in workers)
        finally:
            parent.kill()
    end = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < end, "loader processes outlive their parent"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"
