"""The demo, small: two panels, printed, on disk and in the page; made anew over itself."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console

from builders import known_run, run_config
from c2r import demo
from c2r.config.known_features import SyntheticConfig
from c2r.config.load import load_config
from c2r.config.run import RunConfig
from c2r.demo import run_demo
from c2r.known_features.presets import known_features
from c2r.training.trainer import train

FIGURES = {"ev", "known_absorption", "hole", "latents_per_parent", "mcc"}


@pytest.mark.usefixtures("quick_meta")
def test_both_panels(
    tiny_models: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert demo.SUITES == ("core", "absorption", "splitting")
    original = demo._asset

    def small(name: str, out: Path) -> RunConfig:
        if name == "demo.yaml":
            return run_config(out, tiny_models["llama"], corpus)
        config = original(name, out)
        return config.model_copy(update={"train": config.train.model_copy(update={"tokens": 25_600, "device": "cpu"})})

    monkeypatch.setattr(demo, "_asset", small)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 300)
    monkeypatch.setattr(demo, "SUITES", ("core", "splitting"))  # the tiny tokenizer has too few words for letters
    out = tmp_path / "demo"
    run_demo(out)
    printed = capsys.readouterr().out
    assert printed.index("On the language model's activations") < printed.index("On known features")
    assert "absorption of known parents" in printed
    assert [row["name"] for row in json.loads((out / "summary.json").read_text())] == ["baseline", "c2r"]
    known = json.loads((out / "known_features.json").read_text())
    assert [row["name"] for row in known] == ["baseline", "c2r"]
    assert all(set(row) >= FIGURES for row in known)
    page = (out / "report.html").read_text()
    second = page[page.index("<h2>On known features</h2>") :]
    assert "absorption of known parents" in second
    assert format(known[1]["mcc"], ".3f") in second
    assert (out / "known_features" / "c2r" / "cfg.json").is_file()
    first_time = (out / "known_features.json").stat().st_mtime_ns
    run_demo(out)
    assert (out / "known_features.json").stat().st_mtime_ns > first_time
    assert json.loads((out / "known_features.json").read_text()) == known


@pytest.mark.parametrize("stopped", [True, False])
def test_a_stopped_demo_is_gone_on_with_and_a_finished_one_made_anew(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = known_run(tmp_path / "demo")
    train(config)
    if stopped:
        (tmp_path / "demo" / "c2r" / "cfg.json").unlink()
    asked: list[bool] = []

    def asking(config: RunConfig, *, overwrite: bool, console: Console) -> None:
        asked.append(overwrite)
        raise InterruptedError

    monkeypatch.setattr(demo, "_asset", lambda name, out: known_run(out))
    monkeypatch.setattr(demo, "train", asking)
    with pytest.raises(InterruptedError):
        run_demo(tmp_path / "demo")
    assert asked == [not stopped]


def test_the_second_panel_has_as_many_latents_as_features_and_their_l0() -> None:
    config = load_config(Path(str(files("c2r") / "assets" / "known_features.yaml")))
    assert isinstance(config.data, SyntheticConfig)
    features = known_features(config.data)
    for sae in config.saes:
        assert sae.width == features.features
        assert sae.model_dump()["k"] == round(features.mean_l0)
    baseline, c2r = (sae.model_dump(exclude={"name", "c2r"}) for sae in config.saes)
    assert baseline == c2r
