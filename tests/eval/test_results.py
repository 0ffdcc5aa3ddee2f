"""Result files: what they record, what a second evaluation does to the first, and outputs that cannot be written."""

import json
import os
import re
import shlex
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from builders import known_run, run_config
from c2r import identity
from c2r.activations import identify
from c2r.activations.harvest import fill_cache
from c2r.cli import main
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval import disk_cache, suite
from c2r.eval.disk_cache import Cache
from c2r.eval.results import unfinished
from c2r.eval.suite import evaluate
from c2r.interop.saelens import load_sae
from c2r.language_model.model import load_language_model
from c2r.report.audit import print_audit, write_audit
from c2r.report.html import write_report
from c2r.report.table import print_results, summary_of_files
from c2r.text.sources import open_reader
from c2r.training.folder import as_written
from c2r.training.signals import Stopped
from c2r.training.trainer import train
from small_runs import signalled

pytestmark = pytest.mark.usefixtures("quick_meta")
QUIET = Console(quiet=True)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_result_records_what_it_is_of(tiny_run: dict[str, Path], tiny_models: dict[str, Path], corpus: Path) -> None:
    evaluate([tiny_run["c2r"]], suites=("core",), tokens=100, console=QUIET)
    found = read(tiny_run["c2r"].parent / "evaluations" / "c2r_core.json")["eval_config"]["identity"]
    lm = load_language_model(ModelConfig(name=str(tiny_models["llama"])))
    assert ":".join(found["model"].values()) == lm.identity
    assert found["tokenizer"] == identity.of_tokenizer(lm.tokenizer)
    reader = open_reader("data", DataConfig(source="files", path=str(corpus)), held_out=True)
    assert found["text"] == {"data": reader.identity()}
    assert found["code"] == identity.versions()
    trained = read(tiny_run["c2r"] / "cfg.json")["c2r"]["identity"]
    assert {part: trained[part] for part in ("model", "tokenizer")} == {p: found[p] for p in ("model", "tokenizer")}
    assert found["sae"] == identity.of_tensors(sorted(load_sae(tiny_run["c2r"]).state_dict().items()))


def test_results_of_another_question_are_kept(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, out = tmp_path / "other.txt", tmp_path / "out"
    other.write_text("Entirely different words stand here. " * 60)
    console = Console(record=True, width=300)

    def evaluated(**changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"suites": ("core",), "tokens": 200, "console": console}
        evaluate([tiny_run["c2r"]], out, **settings | changes)
        return read(out / "c2r_core.json")

    def kept() -> list[dict[str, Any]]:
        return sorted((read(path) for path in (out / "earlier").glob("*")), key=lambda r: r["datetime_epoch_millis"])

    first = evaluated()
    again = evaluated()
    assert first["eval_id"] != again["eval_id"]
    assert os.listdir(out) == ["c2r_core.json"]  # the same question: replaced
    monkeypatch.setattr(identify, "versions", lambda: {"c2r": "0.0.0"})
    again = evaluated()
    assert again["eval_config"]["identity"]["code"] == {"c2r": "0.0.0"}
    assert os.listdir(out) == ["c2r_core.json"]  # and versions are no question
    assert "earlier" not in console.export_text()
    second = evaluated(data={"source": "files", "path": str(other)})
    assert kept() == [again]
    assert f"other settings, text, model or weights to {out / 'earlier' / 'c2r_core_20'}" in console.export_text()
    assert summary_of_files(out, ["c2r"])[0]["ev"] == second["eval_result_unstructured"]["summary"]["ev"]
    assert second["eval_result_unstructured"]["summary"]["ev"] != again["eval_result_unstructured"]["summary"]["ev"]
    other.write_text("Altogether different words stand here. " * 60)  # other text under the same path
    third = evaluated(data={"source": "files", "path": str(other)})
    assert kept() == [again, second]
    weights = load_file(tiny_run["c2r"] / "sae_weights.safetensors")  # another SAE under the same name
    save_file(weights | {"b_dec": weights["b_dec"] + 0.1}, tiny_run["c2r"] / "sae_weights.safetensors")
    evaluated(data={"source": "files", "path": str(other)})
    assert kept() == [again, second, third]


def test_a_users_file_of_a_results_name_is_kept(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c2r_splitting.json").write_text("all my work")
    evaluate([tiny_run["c2r"]], tmp_path / "out", suites=("splitting",), tokens=100, console=QUIET)
    (kept,) = (tmp_path / "out" / "earlier").iterdir()
    assert kept.read_text() == "all my work"
    assert read(tmp_path / "out" / "c2r_splitting.json")["sae_lens_id"] == "c2r"


def test_an_audits_page_is_kept_with_its_figures(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for seed in ("0", "1"):
        main(["audit", str(tiny_run["c2r"]), "--out", str(out), "--tokens", "200", "--seed", seed])
    assert sorted(os.listdir(out)) == ["c2r_audit.html", "c2r_audit.json", "earlier"]
    kept = sorted((out / "earlier").iterdir())
    assert [path.suffix for path in kept] == [".html", ".json"]
    assert kept[0].stem == kept[1].stem
    assert read(kept[1])["eval_config"]["seed"] == 0


# Outputs that cannot be written


def test_an_out_that_cannot_be_written_is_refused_before_the_work(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "load_language_model", None)
    (tmp_path / "file").write_text("")
    for command in ("eval", "audit"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(tiny_run["c2r"]), "--out", str(tmp_path / "file" / "x")])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert (
            f"c2r: error: --out: cannot write in {tmp_path / 'file' / 'x'}: {tmp_path / 'file'} is not a folder" in said
        )
    (tiny_run["c2r"].parent / "evaluations").write_text("in the way")
    with pytest.raises(ValueError, match=r"out: cannot write in .*evaluations is not a folder"):
        evaluate([tiny_run["c2r"]], console=QUIET)


def test_a_result_that_cannot_be_written_is_kept_elsewhere(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "out" / "baseline_splitting.json").mkdir(parents=True)  # in the way of one of two results
    results = evaluate(list(tiny_run.values()), tmp_path / "out", suites=("splitting",), tokens=100, console=QUIET)
    (failed,) = results.failed
    assert re.match(r"baseline, splitting: .*cannot write .*the result was saved as ", failed)
    aside = Path(failed.rsplit("the result was saved as ", 1)[1].removesuffix(" instead"))
    assert read(aside)["sae_lens_id"] == "baseline"
    assert aside.is_relative_to(tmp_path / "temporary")
    assert read(tmp_path / "out" / "c2r_splitting.json")["sae_lens_id"] == "c2r"
    assert results["baseline"]["max_cos_mean"] is not None


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    for _ in range(2):
        assert cache.get("x", {}, lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    assert capsys.readouterr().err.count("nothing is kept for later evaluations") == 1


def test_other_code_makes_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version may be the same: a checkout that is worked on has one for months."""
    cache = Cache(tmp_path)
    assert cache.get("x", {}, lambda: {"x": torch.zeros(1)})["x"] == 0
    assert cache.get("x", {}, lambda: {"x": torch.ones(1)})["x"] == 0
    monkeypatch.setattr(disk_cache, "source_digest", lambda: "another")
    assert cache.get("x", {}, lambda: {"x": torch.ones(1)})["x"] == 1


def test_the_source_is_that_of_what_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(
        Path(identity.__file__).parent, tmp_path / "c2r", ignore=shutil.ignore_patterns("embedded", "*.pyc")
    )
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "c2r" / "identity.py"))
    digest = identity.source_digest.__wrapped__
    before = digest()
    assert before == identity.source_digest()
    for name, counts in (
        ("report/table.py", False),
        ("training/run.py", False),
        ("cli.py", False),
        ("eval/core.py", True),
    ):
        with (tmp_path / "c2r" / name).open("a") as file:
            file.write("# a word\n")
        assert (digest() != before) == counts


# SAEs whose training was cut short


def test_an_unfinished_sae_is_marked_wherever_it_is_shown(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, {3: [signal.SIGINT]})
    with pytest.raises(Stopped):
        train(run_config(tmp_path / "run", tiny_models["llama"], corpus), console=QUIET)
    console = Console(record=True, width=200)
    folder = tmp_path / "run" / "c2r"
    results = evaluate([folder], suites=("core", "splitting", "audit"), tokens=200, console=console)
    assert "c2r: training was stopped after 512 of 2,560 tokens" in console.export_text()
    print_results(results, console)
    said = console.export_text()
    assert "c2r ‡" in said
    assert "‡ c2r is unfinished: it was trained on 512 of 2,560 tokens" in said
    evaluations = tmp_path / "run" / "evaluations"
    print_audit(evaluations / "c2r_audit.json", console)
    assert "UNFINISHED: it was trained on 512 of 2,560 tokens" in console.export_text().replace("\n", " ")
    write_audit(tmp_path / "audit.html", evaluations / "c2r_audit.json")
    assert "it was trained on 512 of 2,560 tokens" in (tmp_path / "audit.html").read_text(encoding="utf-8")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["sae"] == "c2r"))
    write_report(tmp_path / "report.html", tmp_path / "metrics.jsonl", evaluations, ["c2r"])
    assert "trained on 512 of 2,560 tokens" in (tmp_path / "report.html").read_text(encoding="utf-8")
    train(run_config(tmp_path / "run", tiny_models["llama"], corpus), console=QUIET)
    results = evaluate([folder], suites=("core",), tokens=200, console=QUIET)
    print_results(results, console)
    assert "‡" not in console.export_text()


def test_only_what_is_known_to_be_unfinished_is_called_so() -> None:
    def config(tokens: int, stopped: str | None) -> dict[str, Any]:
        return {"c2r": {"state": {"tokens": tokens, "stopped": stopped}, "train": {"tokens": 100}}}

    assert unfinished(config(100, None)) == {}
    assert unfinished({"metadata": {}}) == unfinished({"c2r": {"model": None}}) == {}
    assert unfinished(config(64, "Stopped")) == unfinished(config(64, None)) == {
        "trained_tokens": 64, "train_tokens": 100,
    }  # fmt: skip


def test_an_sae_read_on_another_model_than_it_was_trained_on_is_said(
    tiny_run: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    console = Console(record=True, width=300)
    evaluate([tiny_run["c2r"]], suites=("splitting",), tokens=100, console=console)
    assert "another model" not in console.export_text()
    shutil.copytree(tiny_models["llama"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    evaluate([tiny_run["c2r"]], suites=("splitting",), tokens=100, model=str(tmp_path / "model"), console=console)
    assert "c2r was trained on another model: model.weights: in training" in console.export_text()


# Commands to run next


def commands(printed: str) -> list[str]:
    return [line.removeprefix("next: c2r ") for line in printed.splitlines() if line.startswith("next: ")]


def test_the_commands_that_are_printed_can_be_run(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two hook points, three SAEs, and a folder with a space and a quote in its name."""
    saes = [
        {"name": "a", "width": 32, "k": 2},
        {"name": "b", "width": 32, "k": 2, "layer": 0, "hook": "mlp_out"},
        {"name": "c", "width": 32, "k": 2},
    ]
    folder = tmp_path / "my 'odd' runs"
    config = run_config(folder / "run", tiny_models["llama"], corpus, saes=saes, cache={"path": str(folder / "acts")})
    path = tmp_path / "my run.yaml"
    path.write_text(yaml.safe_dump(as_written(config)))
    main(["harvest", str(path), "--set", "saes.2.name=d", "train.lr=2e-3"])
    (harvested,) = commands(capsys.readouterr().out)
    assert shlex.split(harvested) == ["train", str(path), "--set", "saes.2.name=d", "train.lr=2e-3"]
    main(shlex.split(harvested))
    printed = commands(capsys.readouterr().out)
    assert [shlex.split(line) for line in printed] == [
        ["eval", str(folder / "run" / "a"), str(folder / "run" / "d")],
        ["eval", str(folder / "run" / "b")],
    ]
    for line in printed:
        main([*shlex.split(line), "--tokens", "100"])


def test_the_command_after_a_run_on_known_features_can_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(as_written(known_run(Path("-odd")))))
    main(["train", "run.yaml"])
    (line,) = commands(capsys.readouterr().out)
    main([*shlex.split(line), "--tokens", "500"])
    assert (tmp_path / "-odd" / "evaluations" / "c2r_recovery.json").is_file()


# The user's home folder


def test_a_tilde_is_the_users_home_wherever_a_path_is_given(
    tiny_models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(tiny_models["llama"], home / "lm")
    shutil.copytree(corpus, home / "text")
    first = run_config(Path("~/first"), "~/lm", Path("~/text"), cache={"path": "~/acts"})
    raw = first.model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw |= {"output": "~/second", "cache": {"path": "~/acts"}, "model": {"name": "~/lm", "layer": 1}}
    raw["data"] = {"source": "mixture", "context": 16, "parts": [{"source": "files", "path": "~/text/*.jsonl"}] * 2}
    raw["saes"] = [{"name": "tuned", "width": 32, "k": 4, "init": "~/first/c2r"}]
    del raw["cache"]
    fill_cache(first, console=QUIET)
    train(first, console=QUIET)
    (home / "run.yaml").write_text(yaml.safe_dump(raw))
    main(["train", "~/run.yaml"])
    main(["eval", "~/second/tuned", "--out=~/out", "--model=~/lm", "--tokens", "100", "--path=~/text/a.txt"])
    assert (home / "out" / "tuned_core.json").is_file()
    assert (home / "acts" / "manifest.json").is_file()
    assert os.listdir(tmp_path / "here") == []
    with pytest.raises(ValueError, match=r"output: .*got '~nobody-here/x'"):
        known_run(Path("~nobody-here/x"))
