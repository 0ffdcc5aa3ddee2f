"""What evaluations share: the cache on disk, and results that stand when another evaluation fails."""

import json
from pathlib import Path

import pytest
import torch

from c2r.eval import suite
from c2r.eval.bench import Bench, Cache, Outcome, each
from c2r.eval.suite import evaluate
from c2r.sae.base import SAE
from c2r.train.trainer import train
from helpers import run_config


def test_the_cache_makes_once_and_repairs(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"x": torch.arange(6.0).reshape(2, 3).T}

    cache = Cache(tmp_path)
    for _ in range(2):
        assert torch.equal(cache.get("x", {"a": 1}, make)["x"], torch.arange(6.0).reshape(2, 3).T)
    assert len(made) == 1
    cache.get("x", {"a": 2}, make)
    assert len(made) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(cache.get("x", {"a": 1}, make)["x"], torch.arange(6.0).reshape(2, 3).T)
    assert len(made) == 3


def test_activations_are_collected_once(tiny_models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    folders = list(train(run_config(tmp_path / "run", tiny_models["llama"], corpus)).values())
    first = evaluate(folders, suites=("splitting",), tokens=300, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("activations-*")
    written = file.stat().st_mtime_ns
    assert evaluate(folders, suites=("splitting",), tokens=300, cache=tmp_path / "cache") == first
    assert file.stat().st_mtime_ns == written
    evaluate(folders, suites=("splitting",), tokens=300, seed=1, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("activations-*"))) == 2


def test_one_failure_leaves_the_others_on_disk(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frail(bench: Bench, name: str, sae: SAE) -> Outcome:
        if name == "baseline":
            raise ValueError("broken by hand")
        return Outcome(name, "frail", {"frail": {"one": 1.0}}, {"one": 1.0})

    monkeypatch.setitem(suite.SUITES, "frail", each("frail", frail))
    folders = train(run_config(tmp_path / "run", tiny_models["llama"], corpus))
    with pytest.raises(ValueError, match="baseline, frail: ValueError: broken by hand"):
        evaluate(list(folders.values()), tmp_path / "out", suites=("frail", "splitting"), tokens=100)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "c2r_frail.json",
        "baseline_splitting.json",
        "c2r_splitting.json",
    }
    result = json.loads((tmp_path / "out" / "c2r_frail.json").read_text())
    assert result["eval_result_metrics"] == {"frail": {"one": 1.0}}
    assert result["eval_result_unstructured"]["summary"] == {"one": 1.0}
