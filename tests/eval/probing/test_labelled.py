"""Labelled texts: the standard library's against Python's own tools, and files and data sets that are the user's."""

import ast
import io
import json
import tokenize
from pathlib import Path

import pytest

from builders import tiny_tokenizer
from c2r.eval.probing import labelled
from c2r.eval.probing.labelled import LabelledTexts, check_labelled, labelled_texts, stdlib_tasks
from c2r.text.packing import text_rows
from c2r.text.stdlib import stdlib_sources


@pytest.fixture(scope="module")
def tasks() -> dict[str, LabelledTexts]:
    return {task.name: task for task in stdlib_tasks()}


def held_out() -> dict[str, str]:
    return dict(stdlib_sources(held_out=True))


def test_every_task_has_enough_distinct_texts(tasks: dict[str, LabelledTexts]) -> None:
    assert set(tasks) == {"stdlib_module", "stdlib_statement", "stdlib_region"}
    assert set(tasks["stdlib_region"].texts) == {"code", "comment", "docstring"}
    assert len(tasks["stdlib_module"].texts) == 6
    assert set(tasks["stdlib_statement"].texts) >= {"assignment", "for", "function", "if", "return"}
    for task in tasks.values():
        texts = [text.strip() for label in task.texts.values() for text in label]
        assert len(set(texts)) == len(texts)  # none is in two splits or under two labels
        assert all(labelled.LEAST <= len(label) <= labelled.MOST for label in task.texts.values())


def test_texts_come_from_held_out_files(tasks: dict[str, LabelledTexts]) -> None:
    trained_on = dict(stdlib_sources(held_out=False))
    sources = held_out()
    assert not set(sources) & set(trained_on)
    for name, passages in tasks["stdlib_module"].texts.items():
        without_blank = "\n".join(line for line in sources[name].splitlines() if line.strip())
        assert all(passage in without_blank for passage in passages)


def test_statements_are_what_the_parser_says(tasks: dict[str, LabelledTexts]) -> None:
    for name in ("abc.py", "reprlib.py", "fnmatch.py"):
        text = held_out()[name]
        found = list(labelled._statements(text))
        expected = [
            (labelled._KINDS[type(node)], "\n".join((ast.get_source_segment(text, node) or "").split("\n")[:2]))
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.stmt) and type(node) in labelled._KINDS
        ]
        assert found == expected
        assert len(found) > 10
    for source in tasks["stdlib_statement"].texts["return"] + tasks["stdlib_statement"].texts["raise"]:
        assert source.startswith(("return", "raise"))


def test_statements_with_wide_characters() -> None:
    found = list(labelled._statements("if 'ä€' and (x := 1): y = 'é'  # comment\nz = [1,\n  2]; w = 3\n"))
    assert ("assignment", "y = 'é'") in found
    assert ("assignment", "z = [1,\n  2]") in found
    assert ("assignment", "w = 3") in found


def test_regions_are_what_the_tokenizer_says(tasks: dict[str, LabelledTexts]) -> None:
    comments: set[str] = set()
    strings = ""
    for text in held_out().values():
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.string.strip("#! "))
            elif token.type == tokenize.STRING and token.string[0] not in "fF":
                strings += str(ast.literal_eval(token.string)).expandtabs() + "\n"
    texts = tasks["stdlib_region"].texts
    assert set(texts["comment"]) <= comments
    assert all(line in strings for line in texts["docstring"])
    assert not comments & set(texts["docstring"])
    assert all(len(line.split()) >= 3 for line in texts["comment"] + texts["docstring"])


def test_the_seed_fixes_the_texts() -> None:
    pairs = [(label, f"text {i} {label}") for i in range(30) for label in "ab"]
    first = labelled._by_label("x", pairs, 0)
    assert labelled._by_label("x", pairs, 0) == first
    other = labelled._by_label("x", pairs, 1)
    assert other != first
    assert {k: sorted(v) for k, v in other.texts.items()} == {k: sorted(v) for k, v in first.texts.items()}


def test_labels_without_enough_texts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "LABELS", 3)
    sizes = {"a": 30, "b": 19, "c": 25, "d": 40, "e": 22}
    pairs = [(label, f"{label}{i}") for label, size in sizes.items() for i in range(size)]
    found = labelled._by_label("x", pairs + pairs, 0)
    assert {label: len(texts) for label, texts in found.texts.items()} == {"a": 30, "c": 25, "d": 40}
    assert found.left_out == {"b": 19, "e": 22}
    monkeypatch.setattr(labelled, "MOST", 21)
    assert {len(texts) for texts in labelled._by_label("x", pairs, 0).texts.values()} == {21}
    with pytest.raises(
        ValueError, match=r"x: needs at least two labels with at least 20 distinct texts.*'a' 30, 'b' 19"
    ):
        labelled._by_label("x", [pair for pair in pairs if pair[0] in "ab"], 0)


def write(path: Path, records: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_a_jsonl_file_and_a_data_set_folder(tmp_path: Path) -> None:
    records = [{"text": f"text {i}", "label": i % 2, "other": 1} for i in range(60)]
    path = write(tmp_path / "mine.jsonl", records)
    check_labelled(str(path))
    found = labelled_texts(str(path))
    assert found.name == "mine"
    assert {label: sorted(texts) for label, texts in found.texts.items()} == {
        str(k): sorted(f"text {i}" for i in range(60) if i % 2 == k) for k in range(2)
    }
    of_folder = labelled_texts(str(tmp_path))  # read by `datasets`
    assert {k: sorted(v) for k, v in of_folder.texts.items()} == {k: sorted(v) for k, v in found.texts.items()}
    assert labelled_texts(str(tmp_path / "*.jsonl")).texts == found.texts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a", "label": 1.5}\n', r"x.jsonl:1: expected 'text', a string, and 'label'"),
        ('{"text": "a"}\n', r"x.jsonl:1: expected"),
        ('{"label": "a"}\n', r"x.jsonl:1: expected"),
        ("[1]\n", r"x.jsonl:1: expected a JSON object; found list"),
        ("{\n", r"x.jsonl:1 is not JSON"),
        ("\n", r"x.jsonl contains no record"),
        (None, r"no file matches"),
    ],
)
def test_a_users_mistake_is_named(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"probe_data: .*{says}"):
        check_labelled(str(path))


def test_one_label_is_not_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": f"t{i}", "label": "a"} for i in range(50)])
    with pytest.raises(ValueError, match="probe_data: x: needs at least two labels with at least 20"):
        labelled_texts(str(path))
    with pytest.raises(ValueError, match="probe_data: cannot open data set"):
        check_labelled(str(tmp_path / "nowhere"))


# Rows of texts


def test_a_text_a_row() -> None:
    tokenizer = tiny_tokenizer()  # <|end|> is BOS, EOS and padding
    texts = ["The quick brown fox", "a", "", "jumps over the lazy dog. " * 5]
    batches = list(text_rows(texts, tokenizer, context=12, rows=3))
    assert [len(part.ids) for part in batches] == [3, 1]
    read = [ids[real] for part in batches for ids, real in zip(part.ids, part.real, strict=True)]
    for text, ids in zip(texts, read, strict=True):
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][:11]
    assert all((part.ids[:, 0] == 0).all() and not part.real[:, 0].any() for part in batches)
    assert batches[1].ids.shape == (1, 12)
