"""Which text SAEs are read on: the one that all of their files name, or the one that the caller does."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from c2r.config.text import DataConfig
from c2r.eval.provenance import data_of, text_of_all
from c2r.eval.suite import evaluate

BASE = {"source": "files", "path": "a.txt", "context": 32}


def ours(bos: bool | None = True, **changes: Any) -> dict[str, Any]:
    data = DataConfig.model_validate(BASE | changes).model_dump(mode="json")
    return {"c2r": {"data": data}, "metadata": {"context_size": data["context"], "prepend_bos": bos}}


def theirs(context: int | None = 32, bos: bool | None = True) -> dict[str, Any]:
    return {"metadata": {"context_size": context, "prepend_bos": bos, "dataset_path": "some/text"}}


def in_any_order(configs: list[dict[str, Any]], changes: dict[str, Any]) -> DataConfig:
    """The text, found to be the same in every order of the SAEs."""
    named = {f"sae{i}": config for i, config in enumerate(configs)}
    found = [text_of_all(dict(order), changes) for order in itertools.permutations(named.items())]
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (ours(path="b.txt"), "path 'a.txt' and 'b.txt'"),
        (ours(context=16), "context 32 and 16"),
        (ours(drop_tokens=[7]), r"drop_tokens \[\] and \[7\]"),
        (ours(spelling_fraction=0.1), r"spelling_fraction 0\.0 and 0\.1"),
        (ours(bos=False), "prepend_bos True and False"),
        (theirs(context=64), "context 32 and 64"),
        (theirs(bos=False), "prepend_bos True and False"),
    ],
)
def test_saes_of_different_text_are_refused(other: dict[str, Any], differs: str) -> None:
    for order in ({"one": ours(), "two": other}, {"two": other, "one": ours()}):
        with pytest.raises(ValueError, match=rf"one and two were trained on different text: {differs}\. Evaluate"):
            text_of_all(order, {})


def test_saes_of_one_text_are_read_on_it() -> None:
    assert in_any_order([ours(), ours(workers=2), ours(bos=None)], {}).path == "a.txt"
    # Another library's file names no text of ours: the text is that of the others, whatever the order.
    assert in_any_order([theirs(), ours(), theirs(context=None)], {}).path == "a.txt"
    assert in_any_order([theirs(), theirs()], {}).source == "stdlib"


def test_a_text_that_is_named_is_every_ones() -> None:
    named = {"source": "files", "path": "c.txt"}
    assert in_any_order([ours(), ours(path="b.txt")], named).path == "c.txt"
    assert in_any_order([ours(), theirs(bos=False)], named).path == "c.txt"
    assert in_any_order([ours(), ours(path="b.txt", context=16)], named | {"context": 64}).context == 64
    with pytest.raises(ValueError, match="context 32 and 16"):  # how rows are read is not named
        text_of_all({"one": ours(), "two": ours(path="b.txt", context=16)}, named)


def test_another_text_keeps_how_rows_are_read_and_which_tokens_count() -> None:
    found = data_of(ours(drop_tokens=[7], spelling_fraction=0.5), {"source": "files", "path": "c.txt"})
    assert (found.context, found.drop_tokens, found.spelling_fraction, found.path) == (32, [7], 0.0, "c.txt")


def test_evaluating_refuses_before_any_work(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((tiny_run["c2r"] / "cfg.json").read_text())
    config["c2r"]["data"]["context"] = 8
    (tiny_run["c2r"] / "cfg.json").write_text(json.dumps(config))
    folders, quiet = list(tiny_run.values()), Console(quiet=True)
    with pytest.raises(ValueError, match="baseline and c2r were trained on different text: context 16 and 8"):
        evaluate(folders, tmp_path / "out", tokens=100, console=quiet)
    assert not (tmp_path / "out").exists()
    found = evaluate(folders, suites=("core",), data={"context": 16}, tokens=100, console=quiet)
    assert set(found) == {"baseline", "c2r"}
