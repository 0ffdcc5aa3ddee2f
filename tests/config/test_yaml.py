"""YAML with duplicate keys, missing values, or values that YAML 1.1 would read differently."""

from pathlib import Path
from typing import Any

import pytest

from c2r.config.load import load_config, set_values
from c2r.config.yaml_text import load_yaml

RUN = """
output: runs/x
train: {tokens: 4096, lr: 1e-3}
saes:
  - &first
    name: a
    width: 16
    k: 2
    c2r: {strength: 0.9}
  - <<: *first
    name: b
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", r"line 2: 'seed' is given twice, first in line 1"),
        ("train: {lr: 1, lr: 1}\n", r"line 1: 'lr' is given twice, first in line 1"),
        (
            "saes:\n  - k: 2\n    c2r:\n      alpha: 1\n      alpha: 1\n",
            r"line 5: 'alpha' is given twice, first in line 4",
        ),
        ("'seed': 1\nseed: 2\n", r"line 2: 'seed' is given twice"),
        ("a: &x {p: 1}\nb: {<<: *x, <<: *x}\n", r"line 2: '<<' is given twice"),
        ("1: x\n", r"line 1: a key must be a string; got '1', which YAML reads as int"),
        ("true: x\n", r"got 'true', which YAML reads as bool"),
        ("? [a, b]\n: x\n", r"line 1: a key must be a string"),
        ("seed: 1\n---\nseed: 2\n", r"line 2: a second document begins"),
        ("train:\n\tlr: 1\n", r"line 2, column 1: a tab; indent YAML with spaces"),
        ("a: &x [*x]\n", "not valid YAML"),
        ("a: {b: }\n", r"line 1, .*: no value given"),
    ],
)
def test_faults_name_the_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(write(tmp_path, text))


def test_merging_and_anchors(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RUN), ("saes.0.c2r.strength=0.3", "saes.1.k=4"))
    strengths = [sae.c2r.strength for sae in config.saes if sae.c2r is not None]
    assert strengths == [0.3, 0.9]  # an override of one SAE does not change the other
    assert [sae.k for sae in config.saes] == [2, 4]  # pyright: ignore[reportAttributeAccessIssue]
    assert config.train.lr == 1e-3
    nested = "p: {q: {r: &x {<<: &y {a: 1, b: 2}, b: 3}}}\ns: {<<: [*x, {c: 4}], a: 5}\n"
    assert load_yaml(nested) == {"p": {"q": {"r": {"a": 1, "b": 3}}}, "s": {"a": 5, "b": 3, "c": 4}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("true", True), ("False", False),
        ("007", "007"), ("12:30", "12:30"), ("2024-01-31", "2024-01-31"), ("1e-3", "1e-3"), ("1.5e3", 1500.0),
        ("2_000", 2000), ("0x1F", 31), ("-3", -3), ("+4", 4), (".5", 0.5), ("1.", 1.0), ("~", None), ("null", None),
        (".inf", float("inf")), ("0", 0), ("1_000.5", 1000.5), ("'1'", "1"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    found = load_yaml(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_names_that_look_like_something_else(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RUN.replace("name: a", "name: no").replace("name: b", "name: 007")))
    assert [sae.name for sae in config.saes] == ["no", "007"]
    with pytest.raises(ValueError, match=r"saes\.0\.name: .*\(got 12; quote text that looks like .*\)"):
        load_config(write(tmp_path, RUN.replace("name: a", "name: 12")))
    hf = "data: {source: hf, path: x, streaming: no}\n"
    assert load_config(write(tmp_path, RUN + hf)).data.streaming is False  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("seed=1", "seed=2"), r"seed: given twice, as '1' and '2'"),
        (("train={tokens: 1, tokens: 2}",), r"train: got .*line 1: 'tokens' is given twice"),
        (("data={path: }",), r"data: got '{path: }': .*no value given"),
        (("train={1: 2}",), r"train: got .*a key must be a string"),
    ],
)
def test_overrides_too(changes: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(write(tmp_path, RUN), changes)


def test_settings_of_an_evaluation_too() -> None:
    with pytest.raises(ValueError, match=r"absorption\.seeds: given twice"):
        set_values({}, ["absorption.seeds=1", "absorption.seeds=2"])
    raw: dict[str, Any] = {}
    set_values(raw, ["a.b=1", "a.c=no"])
    assert raw == {"a": {"b": 1, "c": "no"}}
