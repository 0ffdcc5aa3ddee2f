"""The scripts under examples/ run as a user would run them, and so do the notebook's cells, in order."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from builders import ROOT

EXAMPLES = ROOT / "examples"


def output_of(*arguments: str | Path, cwd: Path) -> str:
    """What a fresh interpreter prints; on one thread, as the other tests."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def named_numbers(line: str) -> dict[str, float]:
    """The numbers of a line `label: name number, name number, …`."""
    pairs = (pair.rpartition(" ") for pair in line.partition(": ")[2].split(", "))
    return {name: float(number) for name, _, number in pairs}


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    baseline, c2r = output_of(EXAMPLES / "own_loop.py", "--steps", "200", cwd=tmp_path).splitlines()
    number = r"(\d+\.\d+)"
    form = rf"loss {number} -> {number}, nearest cosine {number} -> {number}"
    before, after, cosine_before, cosine = (float(part) for part in re.findall(form, baseline)[0])
    same, c2r_after, same_cosine, c2r_cosine = (float(part) for part in re.findall(form, c2r)[0])
    assert (before, cosine_before) == (same, same_cosine)
    assert max(after, c2r_after) < before / 3
    assert c2r_cosine < cosine / 2


def test_training_and_evaluation_through_the_python_api(tmp_path: Path) -> None:
    script = EXAMPLES / "train_and_evaluate.py"
    small = ("--out", "run", "--tokens", "20_000", "--evaluation-tokens", "1_000")
    baseline, c2r, folders = output_of(script, *small, cwd=tmp_path).splitlines()
    assert folders == f"SAE folders: {Path('run/baseline')}, {Path('run/c2r')}"
    for line in (baseline, c2r):
        figures = named_numbers(line)
        assert set(figures) == {"ev", "ce_recovered", "l0", "alive", "nearest cosine"}
        assert 0.2 < figures["ev"] < 1
    assert named_numbers(c2r)["nearest cosine"] < named_numbers(baseline)["nearest cosine"]
    for name in ("baseline", "c2r"):
        assert (tmp_path / "run" / name / "sae_weights.safetensors").is_file()
        assert (tmp_path / "run" / "evaluations" / f"{name}_core.json").is_file()


def test_recovery_of_known_features(tmp_path: Path) -> None:
    script = EXAMPLES / "known_features.py"
    printed = output_of(script, "--out", tmp_path / "run", "--tokens", "150_000", cwd=tmp_path)
    figures = {line.partition(":")[0]: named_numbers(line) for line in printed.splitlines()}
    absorption = figures["absorption of known parents"]
    assert absorption["c2r"] < 0.05 < 0.15 < absorption["baseline"]
    assert figures["explained variance"]["c2r"] > 0.85


def test_the_notebook(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join(code), encoding="utf-8")
    printed = output_of("cells.py", cwd=tmp_path)
    mean = {name: float(value) for name, value in re.findall(r"(\w+): nearest cosine, mean (\d\.\d+)", printed)}
    assert mean["c2r"] < mean["baseline"]
    assert re.search(r"latents \d+ and \d+: cosine \d\.\d+, both on \d+ of \d+ tokens", printed)
    assert "latent" in printed.partition("nearest cosine")[0]


def test_the_notebook_holds_no_outputs() -> None:
    for cell in json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None, cell["id"]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_says_how_to_run_it(script: Path) -> None:
    assert f"python examples/{script.name}" in script.read_text(encoding="utf-8")
