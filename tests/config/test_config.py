"""A run's YAML: accepted values, and error messages that name the field, what was given and what is accepted."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from c2r.config.load import load_config

GOOD = """
output: runs/x
seed: 0
model:  {name: embedded, layer: 0, hook: resid_post, dtype: float32}
data:   {source: stdlib, spelling_fraction: 0.2, context: 128}
stream: {window_tokens: 131072, max_norm_multiple: 10}
train:  {tokens: 2_000_000, batch: 2048, lr: 1e-3, precision: bfloat16}
saes:
  - {name: baseline, method: batch_top_k, width: 4096, k: 32}
  - {name: c2r,      method: batch_top_k, width: 4096, k: 32, c2r: {strength: 0.9}}
"""


def write(tmp_path: Path, text: str = GOOD) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_the_documented_shape(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config.train.lr == 1e-3
    assert config.train.tokens == 2_000_000
    assert config.train.steps == 977
    assert config.saes[0].c2r is None
    assert config.saes[1].c2r is not None
    with pytest.raises(ValidationError):
        config.seed = 1


def test_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path), ("train.lr=3e-4", "saes.1.c2r.strength=0.3", "saes.0.k=16", "stream.max_norm_multiple=null")
    )
    assert config.train.lr == 3e-4
    assert config.saes[1].c2r is not None
    assert config.saes[1].c2r.strength == 0.3
    assert config.saes[0].k == 16  # pyright: ignore[reportAttributeAccessIssue]
    assert load_config(write(tmp_path), ("train.tokens=2e6", "model.revision=12e4567")).train.tokens == 2_000_000
    assert load_config(write(tmp_path), ("model.revision=12e4567",)).model.revision == "12e4567"
    assert config.stream.max_norm_multiple is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("saes.0.k=5000", r"saes\.0: k: got 5000, more than the width 4096"),
        ("saes.0.k=0", r"saes\.0\.k: .*greater than or equal to 1 \(got 0\)"),
        ("saes.0.width=1", r"saes\.0\.width: .*greater than or equal to 2 \(got 1\)"),
        ("saes.0.name=../x", r"saes\.0\.name"),
        ("saes.0.name=Evaluations", "reserved in a run's folder"),
        ("train.lr=[1", r"train\.lr: got '\[1': not valid YAML"),
        ("train.tokens=2.5", r"train\.tokens"),
        ("saes.0.name=c2r", r"names \['c2r'\] occur more than once"),
        ("saes.0.method=top_n", r"saes\.0: method: got 'top_n'; accepted are standard, .*batch_top_k"),
        ("saes.1.c2r.stregth=1", r"stregth: unknown key; accepted are strength, .*did you mean 'strength'"),
        ("saes.1.c2r.lambda=5", r"exactly one of the two"),
        ("model.layer=-1", r"model\.layer: .*\(got -1\)"),
        ("model.hook=resid", r"model\.hook: .*'resid_pre'.*\(got 'resid'\)"),
        ("data.source=files", r"data: path: nothing given; source 'files' needs one"),
        ("data.path=x", r"source 'stdlib' takes none"),
        ("data.spelling_fraction=1.5", r"data\.spelling_fraction"),
        ("train.batch=0", r"train\.batch"),
        ("train.tokens=lots", r"train\.tokens: .*\(got 'lots'\)"),
        ("stream.window_tokens=10", r"stream\.window_tokens: got 10; accepted is at least train\.batch, 2048"),
        ("saes.0.threshold_start=2000", "the inference threshold would never be learnt"),
        ("sead=1", r"sead: unknown key; accepted are output, seed, .*did you mean 'seed'"),
        ("saes=[]", r"saes: .*at least 1"),
        ("train.lr", r"expected a\.b=c"),
        ("saes.7.k=1", r"'7' is not an index into a list of 2"),
        ("seed.x=1", r"seed is 0, which has no fields"),
        ("saes.1.c2r=", r"saes\.1\.c2r: no value given; write null"),
    ],
)
def test_faults_are_named(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(write(tmp_path), (override,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("seed: 1", "output"),
        ("output: a\nsaes:\n  - name: b\n    c2r:\n      # strength: 0.3\n", r"line 4, 'c2r:': no value given; .*null"),
        ("output: a\ntrain: {tokens: 1, lr: }\n", r"line 2, .*: no value given"),
        ("output:\n", r"line 1, 'output:': no value given"),
    ],
)
def test_unreadable_files(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(write(tmp_path, text))


def test_null_that_is_meant_is_written(tmp_path: Path) -> None:
    for null in ("null", "~", "Null"):
        config = load_config(write(tmp_path, GOOD.replace("{strength: 0.9}", null)))
        assert config.saes[1].c2r is None


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml")
    binary: Any = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(binary)
