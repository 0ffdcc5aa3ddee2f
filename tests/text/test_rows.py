"""How rows begin, records used as rows, and special tokens spelled out in text or chats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from builders import run_config, tiny_tokenizer
from c2r.config.load import parse_config
from c2r.config.text import DataConfig
from c2r.text.packing import Rows, opens_with_bos, packed_rows, text_rows
from c2r.training.trainer import train
from planted import WORDS, documents, planted_tokenizer, records, write_planted

RUN = {"output": "x", "train": {"tokens": 100}, "saes": [{"name": "a", "width": 8, "k": 2}]}
END, BOS, TURN = 1, 2, 2003


def config_of(path: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "files", "path": str(path), "context": 11} | changes)


def joined(rows: list[Rows]) -> list[int]:
    return torch.cat([part.ids.flatten() for part in rows]).tolist()


def test_bos_opens_rows_or_not(tmp_path: Path) -> None:
    write_planted(tmp_path)
    tokenizer = planted_tokenizer()
    for given, opens in ((None, True), (True, True), (False, False)):
        config = config_of(tmp_path, prepend_bos=given)
        rows = list(packed_rows(config, tokenizer))
        assert opens_with_bos(config, tokenizer) == opens
        assert all(((part.ids[:, 0] == BOS) == opens).all() for part in rows)
        assert joined(rows).count(BOS) == (sum(len(part.ids) for part in rows) if opens else 0)
        texts = [" aaa aab", " aac"]
        (part,) = text_rows(texts, tokenizer, context=8, prepend_bos=given)
        assert ((part.ids[:, 0] == BOS) == opens).all()
    without = planted_tokenizer(bos=False)
    assert not opens_with_bos(config_of(tmp_path), without)
    with pytest.raises(ValueError, match=r"data\.prepend_bos: got true, but the tokenizer has no BOS"):
        packed_rows(config_of(tmp_path, prepend_bos=True), without)


@pytest.mark.parametrize("given", [None, False])
def test_the_saes_folder_says_whether_rows_open_with_bos(
    given: bool | None, tiny_models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    data = {"source": "files", "path": str(corpus), "context": 16, "prepend_bos": given}
    config = run_config(tmp_path / "run", tiny_models["llama"], corpus, data=data, train={"tokens": 256, "batch": 128})
    folder = train(config)["baseline"]
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["prepend_bos"] is (given is None)


# Rows as they are


def write_rows(folder: Path, ids: list[list[int]]) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in ids))
    return folder


def test_records_are_rows(tmp_path: Path) -> None:
    given = [[BOS, 5, 6, END, 7], [8] * 11, [9, 10], list(range(20, 40)), [BOS, 11]]
    write_rows(tmp_path, given)
    config = config_of(tmp_path, tokens_field="tokens", rows="as_is")
    tokenizer = planted_tokenizer()
    rows = list(packed_rows(config, tokenizer, rows=2))
    assert [len(part.ids) for part in rows] == [2, 2, 1]
    ids, real = torch.cat([part.ids for part in rows]), torch.cat([part.real for part in rows])
    for row, there, wanted in zip(ids.tolist(), real.tolist(), given, strict=True):
        cut = wanted[:11]
        assert row == cut + [END] * (11 - len(cut))
        assert there == [token not in (END, BOS) for token in cut] + [False] * (11 - len(cut))
    assert not opens_with_bos(config, tokenizer)
    twice = list(packed_rows(config, tokenizer, rows=2, epochs=2))
    for number, part in enumerate(twice):
        rest = list(packed_rows(config, tokenizer, rows=2, epochs=2, start=json.loads(json.dumps(part.position))))
        assert [more.ids.tolist() for more in rest] == [more.ids.tolist() for more in twice[number:]]
        assert [more.position for more in rest] == [more.position for more in twice[number:]]


def test_masks_and_mixtures_of_rows(tmp_path: Path) -> None:
    write_planted(tmp_path)
    part = {"source": "files", "path": str(tmp_path), "tokens_field": "ids", "mask_field": "mask"}
    data = {"source": "mixture", "parts": [part, part | {"weight": 2}], "context": 30, "rows": "as_is"}
    rows = list(packed_rows(DataConfig.model_validate(data), planted_tokenizer(), rows=7))
    known = {tuple(record["ids"]): record["mask"] for record in records(documents())}
    for ids, real in ((ids, real) for part in rows for ids, real in zip(part.ids, part.real, strict=True)):
        row = tuple(token for token in ids.tolist() if token != END)
        assert real.tolist()[: len(row)] == [bool(used) for used in known[row]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"rows": "as_is"}, r"rows: got 'as_is', which needs tokens_field; data has none"),
        (
            {"tokens_field": "ids", "rows": "as_is", "spelling_fraction": 0.1},
            r"spelling_fraction: got 0\.1, but `rows: as_is` adds nothing",
        ),
        ({"tokens_field": "ids", "rows": "as_is", "prepend_bos": True}, r"prepend_bos: got True, but `rows: as_is`"),
        ({"rows": "whole"}, r"data\.rows: .*'packed' or 'as_is' \(got 'whole'\)"),
    ],
)
def test_faults_of_rows_are_named(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_config(RUN | {"data": {"source": "files", "path": "x"} | data}, "test")


# Special tokens


def test_special_tokens_spelled_out_are_text_unless_asked_for(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    text = "the marker <|end|> ends"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for parse in (False, True):
        (part,) = packed_rows(config_of(tmp_path, context=64, parse_special_tokens=parse), tokenizer)
        size = int(part.real.sum()) + (2 if parse else 1)
        ids = part.ids[0, 1 : size + 1].tolist()
        assert ids.count(0) == (2 if parse else 1)
        assert ids[-1] == 0  # the document's end
        assert tokenizer.decode(ids[:-1]) == text
    (part,) = text_rows([text], tokenizer, context=64)
    assert part.ids[0, 1:].tolist().count(0) == 0


TEMPLATES = {
    "none": "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}",
    "one": "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}",
    "two": "{{ bos_token }}{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}",
    "ends": "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}{{ eos_token }}",
    "prompt": "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("given", [None, False])
def test_a_chat_has_the_rows_bos_and_one_end(template: str, adds: bool, given: bool | None, tmp_path: Path) -> None:
    """For all templates, whether or not the tokenizer adds special tokens by default."""
    write_planted(tmp_path, files=1, docs=documents(12))
    tokenizer = planted_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", BOS), ("<|end|>", END)]
        )
    rows = list(packed_rows(config_of(tmp_path, chat_field="chat", context=400, prepend_bos=given), tokenizer))
    ids = joined(rows)
    wanted = [] if given is False else [BOS]
    for doc in documents(12):
        words = [WORDS.index(word) + 3 for word in doc]
        wanted += [TURN, words[0], TURN, *words[1:], END]
    assert ids[: len(wanted)] == wanted
    assert BOS not in ids[1:]
