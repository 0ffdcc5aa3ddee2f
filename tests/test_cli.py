"""The command line in its own process: what it prints, where it writes, how it refuses."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from builders import run_config, write_corpus
from c2r.cli import main
from c2r.config.load import load_config
from c2r.demo import _is_a_demo, run_demo
from c2r.eval.suite import model_of
from c2r.report.html import write_report


def run_yaml(tmp_path: Path, model: Path) -> Path:
    config = run_config(tmp_path / "run", model, write_corpus(tmp_path / "corpus"))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    return path


@pytest.mark.usefixtures("quick_meta")
def test_train_eval_and_report(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml(tmp_path, tiny_models["llama"])
    main(["train", str(path), "--set", "saes.0.k=2", "train.lr=2e-3", "--set", "saes.1.name=b"])
    printed = capsys.readouterr().out
    assert "next: c2r eval" in printed
    recorded = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert recorded["saes"][0]["k"] == 2
    assert recorded["train"]["lr"] == 2e-3
    assert recorded["saes"][1]["name"] == "b"
    names = ["baseline", "b"]
    main(["eval", *(str(tmp_path / "run" / name) for name in names), "--suite", "core,splitting", "--tokens", "200"])
    printed = capsys.readouterr().out
    assert "CE recovered" in printed
    assert "change" in printed
    assert "no evidence" in printed.replace("\n", " ")
    page = tmp_path / "report.html"
    write_report(page, tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "evaluations", names)
    text = page.read_text()
    assert text.count("<svg") == 5
    assert "http" not in text  # nothing is fetched
    figures = json.loads((tmp_path / "run" / "evaluations" / "b_core.json").read_text())["eval_result_metrics"]
    assert format(figures["reconstruction_quality"]["explained_variance"], ".4f") in text


@pytest.mark.usefixtures("quick_meta")
def test_eval_on_other_text_and_model(
    tiny_models: dict[str, Path], tiny_run: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Entirely different words stand here. " * 20)
    sae, out = str(tiny_run["c2r"]), tmp_path / "out"
    main(
        ["eval", sae, "--model", str(tiny_models["qwen3"]), "--path", str(other), "--tokens", "100", "--out", str(out)]
    )
    config = json.loads((out / "c2r_core.json").read_text())["eval_config"]
    assert config["model"]["name"] == str(tiny_models["qwen3"])
    assert config["data"]["path"] == str(other)
    assert config["data"]["context"] == 16  # as the SAE was trained
    assert config["held_out"] is False
    with pytest.raises(SystemExit):
        main(["eval", sae, "--source", "files"])
    assert "path: nothing given" in capsys.readouterr().err
    main(["eval", sae, "--path", str(other), "--tokens", "1000000", "--out", str(out)])
    printed = capsys.readouterr().err.replace("\n", " ")
    assert "may have been trained on" in printed
    recorded = json.loads((out / "c2r_core.json").read_text())["eval_config"]["tokens"]
    assert f"the text ended after {recorded:,} of 1,000,000" in printed


def test_an_sae_cannot_have_its_code_run(tiny_run: dict[str, Path]) -> None:
    folder = tiny_run["c2r"]
    config = json.loads((folder / "cfg.json").read_text())
    config["c2r"]["model"] |= {"trust_remote_code": True, "revision": "deadbeef"}
    (folder / "cfg.json").write_text(json.dumps(config))
    assert model_of(config, None).trust_remote_code is False
    assert model_of(config, None, trust_remote_code=True).trust_remote_code is True
    assert model_of(config, "another").revision is None


def test_the_demo_overwrites_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(Path(str(files("c2r") / "assets" / "demo.yaml"))).model_copy(update={"output": tmp_path})
    assert not _is_a_demo(tmp_path, config)
    (tmp_path / "run.yaml").write_text("seed: 0\nsaes: []")
    assert not _is_a_demo(tmp_path, config)
    (tmp_path / "run.yaml").write_text((files("c2r") / "assets" / "demo.yaml").read_text())
    assert _is_a_demo(tmp_path, config)
    with pytest.raises(
        ValueError, match="contains files that c2r did not write"
    ):  # the file lacks the mark of a recorded run
        run_demo(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
        (["eval", "nowhere"], "nowhere: not an SAE folder"),
        (["eval", "--suite", "core"], "SAE folders: got none"),
        (["eval", "x", "--suite", "corr"], "'corr'; accepted are core"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert "Traceback" not in printed


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("c2r")
    done = subprocess.run([program, "train", "none.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "c2r: error: cannot read" in done.stderr
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("c2r ")
