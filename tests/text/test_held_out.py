"""The held-out part of every source: chosen by content, read by evaluations, never by training."""

import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console

from builders import run_config, tiny_tokenizer
from c2r.config.text import DataConfig
from c2r.eval.provenance import data_of
from c2r.eval.suite import evaluate
from c2r.text.document import Document
from c2r.text.held_out import place_of
from c2r.text.packing import packed_rows
from c2r.text.sources import held_out_kept, open_reader
from c2r.training.trainer import train
from planted import WORDS, planted_tokenizer, records, write_parquet


def docs(count: int) -> list[list[str]]:
    rng = random.Random(1)
    return [[rng.choice(WORDS) for _ in range(5)] for _ in range(count)]


def read(config: DataConfig, held_out: bool, seed: int = 0) -> list[str]:
    return [
        json.dumps(document.content if document.form != "tokens" else document.content.tolist())
        for document, _ in open_reader("data", config, held_out).read(seed)
    ]


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    if kind in ("jsonl", "hf"):
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        write_parquet(folder / "a.parquet", rows)
    elif kind == "txt":
        for number, row in enumerate(rows):
            (folder / f"{number}.txt").write_text(row["text"])
    else:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    source = {"source": "hf"} if kind in ("hf", "saved") else {"source": "files"}
    return source | {"path": str(folder)} | ({"streaming": False} if kind == "saved" else {})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "hf", "saved"])
@pytest.mark.parametrize("form", ["text_field", "chat_field", "tokens_field"])
def test_every_document_is_in_one_part(kind: str, form: str, tmp_path: Path) -> None:
    if kind == "txt" and form != "text_field":
        return
    field = {"text_field": "text", "chat_field": "chat", "tokens_field": "ids"}[form]
    source = write(tmp_path / "text", records(docs(300)), kind)
    config = DataConfig.model_validate(source | {form: field, "held_out": 0.1})
    assert held_out_kept(config)
    kept, trained = read(config, True), read(config, False)
    assert not set(kept) & set(trained)
    assert len(kept) + len(trained) == 300
    assert 15 < len(kept) < 45  # 30 ± 3 standard deviations
    assert sorted(read(config, True, seed=5)) == sorted(kept)
    assert sorted(read(config.model_copy(update={"held_out": 0}), True)) == sorted(kept + trained)


def test_the_part_follows_from_the_content_alone(tmp_path: Path) -> None:
    rows = records(docs(400))
    first = DataConfig.model_validate(write(tmp_path / "a", rows, "jsonl"))
    # The same documents in another order, twice each, mixed with others, in another file format.
    other = rows[::-1] + records([[word] for word in WORDS[:50]]) + rows
    second = DataConfig.model_validate(write(tmp_path / "b", other, "parquet"))
    kept, again = set(read(first, True)), read(second, True)
    assert len(kept) >= 4
    assert kept <= set(again)
    assert not set(read(second, False)) & kept
    assert sum(text in kept for text in again) == 2 * len(kept)


def test_long_documents_go_by_their_beginning() -> None:
    opening = "a " * 40_000
    assert place_of(Document("text", opening + "x")) == place_of(Document("text", opening[:70_000], more=True))
    assert place_of(Document("text", "x" + opening)) != place_of(Document("text", opening))


def test_a_long_document_is_in_one_part_as_a_whole(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"Nr {number} " + "word of a long text " * 4000)
    config = DataConfig(source="files", path=str(tmp_path), context=64, held_out=0.5)
    parts = [list(packed_rows(config, tokenizer, rows=64, held_out=held_out)) for held_out in (True, False)]
    texts = ["".join(tokenizer.decode(part.ids[:, 1:].flatten()) for part in rows) for rows in parts]
    assert sum(text.count("Nr ") for text in texts) == 12
    assert all(text.count("Nr ") >= 4 for text in texts)
    assert sum(text.count("word of a long text") for text in texts) == 12 * 4000
    for rows, held_out in zip(parts, (True, False), strict=True):
        for number in (1, len(rows) // 2, len(rows) - 1):
            start = json.loads(json.dumps(rows[number].position))
            rest = packed_rows(config, tokenizer, rows=64, held_out=held_out, start=start)
            assert all(torch.equal(a.ids, b.ids) for a, b in zip(rest, rows[number:], strict=True))


def test_rows_of_training_and_evaluation_share_no_document(tmp_path: Path) -> None:
    source = write(tmp_path / "text", records([[word] for word in WORDS[:1500]]), "jsonl")
    for changes in ({}, {"shuffle_documents": 100}):
        config = DataConfig.model_validate(source | {"context": 16} | changes)
        seen = [
            {token for part in packed_rows(config, planted_tokenizer(), held_out=held_out, epochs=2)
             for token in part.ids[part.real].tolist()}
            for held_out in (True, False)
        ]  # fmt: skip
        assert not seen[0] & seen[1]
        assert len(seen[0]) + len(seen[1]) == 1500
        assert 10 < len(seen[0]) < 50


def test_sources_of_few_documents_are_read_whole(tmp_path: Path) -> None:
    source = write(tmp_path / "text", records(docs(40)), "jsonl")
    config = DataConfig.model_validate(source)
    assert not held_out_kept(config)
    assert read(config, True) == read(config, False)
    copies = write(tmp_path / "copies", records([["aaa"]] * 500), "jsonl")
    assert not held_out_kept(DataConfig.model_validate(copies))
    # If one part holds out nothing, the held-out text of the mixture would include text that was trained on.
    large = write(tmp_path / "large", records(docs(1000)), "jsonl")
    assert held_out_kept(DataConfig.model_validate({"source": "mixture", "parts": [large, large]}))
    assert not held_out_kept(DataConfig.model_validate({"source": "mixture", "parts": [large, source]}))
    assert held_out_kept(DataConfig())


def test_a_position_in_the_other_part_is_refused(tmp_path: Path) -> None:
    config = DataConfig.model_validate(write(tmp_path / "text", records(docs(600)), "jsonl") | {"context": 8})
    start = next(packed_rows(config, planted_tokenizer())).position
    with pytest.raises(ValueError, match="the text was"):
        next(packed_rows(config, planted_tokenizer(), held_out=True, start=start))
    with pytest.raises(ValueError, match="the text was"):
        next(packed_rows(config.model_copy(update={"held_out": 0.03}), planted_tokenizer(), start=start))


def test_evaluation_leaves_out_what_its_training_read(tmp_path: Path) -> None:
    trained = DataConfig(source="files", path="a", held_out=0.1).model_dump(mode="json")
    sae = {"c2r": {"data": trained}}
    assert data_of(sae, {}).held_out == 0.1
    assert data_of(sae, {"source": "files", "path": "b"}).held_out == 0
    assert data_of(sae, {"source": "files", "path": "a"}).held_out == 0.1
    assert data_of(sae, {"source": "stdlib"}).source == "stdlib"
    assert data_of(sae, {"path": "b", "held_out": 0.3}).held_out == 0.3
    assert data_of({"metadata": {}}, {"source": "files", "path": "a"}).held_out == 0
    before = {key: value for key, value in trained.items() if key != "held_out"}
    assert data_of({"c2r": {"data": before}}, {}).held_out == 0
    parts = [{"source": "files", "path": "a", "held_out": 0.1}, {"source": "files", "path": "b"}]
    mixture: Any = {"source": "mixture", "parts": parts}
    assert [part.held_out for part in data_of({"c2r": {"data": mixture}}, {}).parts] == [0.1, 0]


def test_evaluations_read_the_part_and_record_it(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lines = [{"text": f"{number} {' '.join(words)}"} for number, words in enumerate(docs(400))]
    source = write(tmp_path / "text", lines, "jsonl")
    run = run_config(tmp_path / "run", tiny_models["llama"], tmp_path, data=source | {"context": 16, "held_out": 0.1},
                     train={"tokens": 256, "batch": 128})  # fmt: skip
    sae = train(run)["baseline"]
    for data, kept in ((None, True), ({"held_out": 0}, False)):
        said = io.StringIO()
        console = Console(file=said, width=300)
        evaluate([sae], suites=["core"], tokens=200, data=data, out=tmp_path / "out", console=console)
        (result,) = (tmp_path / "out").glob("baseline_core.json")
        assert json.loads(result.read_text())["eval_config"]["held_out"] is kept
        assert ("this source has no held-out part" in said.getvalue()) == (not kept)
        result.unlink()


def test_evaluation_draws_other_spelling_lists_than_training() -> None:
    tokenizer = planted_tokenizer(bos=False)
    config = DataConfig(source="stdlib", spelling_fraction=0.9, context=64)
    lists = []
    for held_out in (False, True):
        rows = itertools.islice(packed_rows(config, tokenizer, rows=32, held_out=held_out), 12)
        flat = [token for part in rows for token in part.ids.flatten().tolist()]
        ends = [-1] + [place for place, token in enumerate(flat) if token == tokenizer.eos_token_id]
        found = {tuple(token for token in flat[a + 1 : b] if token > 2) for a, b in itertools.pairwise(ends)}
        lists.append({words for words in found if len(words) == 40})
    assert min(map(len, lists)) > 20
    assert not lists[0] & lists[1]
