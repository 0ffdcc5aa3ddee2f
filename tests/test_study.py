"""Studies: what is trained, that nothing is done twice, and the comparison against numbers worked out by hand."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from c2r import study as study_module
from c2r.cli import main
from c2r.config.study import StudyConfig, load_study
from c2r.intervals import bootstrap_95
from c2r.study import as_markdown, compare, run_study

QUIET = Console(quiet=True)
SAE = {"method": "batch_top_k", "width": 14, "k": 2}
RAW: dict[str, Any] = {
    "run": {
        "data": {"source": "synthetic", "preset": "tree", "parents": 2, "children": 3, "independent": 6, "d_in": 16},
        "train": {"tokens": 2560, "batch": 128, "lr": 1e-2, "precision": "float32"},
    },
    "arms": {"baseline": SAE, "c2r": {**SAE, "c2r": {"strength": 0.3}}, "wide": {**SAE, "width": 20}},
    "seeds": [0, 1, 2],
    "only": {"wide": [1]},
    "seeds_per_run": 2,
    "against": "baseline",
    "evaluation": {"suites": ["recovery"], "tokens": 500},
}


def study(output: Path, **changes: Any) -> StudyConfig:
    return StudyConfig.model_validate({"output": output, **RAW, **changes})


def test_arms_of_a_seed_share_their_stream_and_their_initialisation(tmp_path: Path) -> None:
    first, last = study(tmp_path).runs()
    assert [sae.name for sae in first.saes] == ["baseline-0", "c2r-0", "baseline-1", "c2r-1", "wide-1"]
    assert [sae.seed for sae in first.saes] == [0, 0, 1, 1, 1]
    assert [sae.name for sae in last.saes] == ["baseline-2", "c2r-2"]
    assert (first.seed, last.seed) == (0, 1)  # another order of the activations
    assert first.output == tmp_path / "seeds-0-1"


def test_a_study_is_run_once_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(tmp_path)
    asked: list[list[str]] = []
    evaluate = study_module.evaluate

    def counted(folders: list[Path], *args: Any, **settings: Any) -> Any:
        asked.append([folder.name for folder in folders])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(folders, *args, **settings)

    monkeypatch.setattr(study_module, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, QUIET)
    path = run_study(config, QUIET)
    assert asked == [["baseline-0", "c2r-0", "baseline-1", "c2r-1", "wide-1"], ["baseline-2", "c2r-2"], *asked[1:2]]
    found = json.loads(path.read_text())
    assert found["arms"]["c2r"]["mcc"]["pairs"] == 3
    assert found["arms"]["wide"]["mcc"]["pairs"] == 1
    assert found["arms"]["wide"]["mcc"]["interval"] is None
    before = path.read_bytes()
    assert run_study(config, QUIET).read_bytes() == before
    assert len(asked) == 3
    (tmp_path / "results" / "c2r-2.json").unlink()
    assert run_study(config, QUIET).read_bytes() == before
    assert asked[-1] == ["c2r-2"]
    run_study(study(tmp_path, evaluation={"suites": ["recovery"], "tokens": 400}), QUIET)  # other settings: anew
    assert [len(names) for names in asked[-2:]] == [5, 2]


def write(folder: Path, arm: str, seed: int, **figures: float | None) -> None:
    folder.mkdir(exist_ok=True)
    content = {"arm": arm, "seed": seed, "sae": "", "evaluation": {}, "figures": figures}
    (folder / f"{arm}-{seed}.json").write_text(json.dumps(content))


def test_the_comparison_by_hand(tmp_path: Path) -> None:
    baseline, c2r = [0.80, 0.70, 0.90], [0.75, 0.71, 0.80]
    for seed in range(3):
        write(tmp_path / "results", "baseline", seed, ev=baseline[seed], letters=None)
        write(tmp_path / "results", "c2r", seed, ev=c2r[seed])
    config = study(tmp_path)
    found = compare(config)
    changes = [b - a for a, b in zip(baseline, c2r, strict=True)]
    assert found["baseline"]["ev"]._replace(sd=0.1) == (pytest.approx(0.8), 0.1, 3, None, None, 0)
    assert found["c2r"]["ev"].change == pytest.approx(sum(changes) / 3)
    assert found["c2r"]["ev"].sd == pytest.approx(statistics.stdev(c2r))
    assert found["c2r"]["ev"].interval == bootstrap_95(changes)
    assert "letters" not in found["baseline"]
    assert found["wide"] == {}
    table = as_markdown(config, found)
    assert "| EV (explained variance) | 0.8000 ± 0.1000 | 0.7533 ± 0.0451 (-0.0467, -0.1000 to +0.0100) | – |" in table


def test_the_bootstrap_against_all_draws() -> None:
    values = [0.0, 1.0, 5.0]
    every = sorted(statistics.fmean((a, b, c)) for a in values for b in values for c in values)
    low, high = bootstrap_95(values, draws=20_000) or (math.nan, math.nan)
    assert low == pytest.approx(every[0])  # 1 of 27 draws, 3.7 %, has the least mean
    assert high == pytest.approx(every[-1])
    assert bootstrap_95([1.0]) is None
    wide, narrow = (bootstrap_95([*range(n)], draws=2000) or (0, 0) for n in (8, 200))
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * statistics.pstdev(range(8)) / math.sqrt(8), rel=0.1)
    assert narrow[0] < statistics.fmean(range(200)) < narrow[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("against=nobody", r"against: got 'nobody'; accepted are baseline, c2r, wide"),
        ("seeds=[1, 1]", r"seeds: \[1\] are given more than once"),
        ("only.wide=[7]", r"only\.wide: \[7\] are not among the seeds"),
        ("only.tall=[1]", r"only\.tall: no such arm"),
        ("run.saes=[]", r"run\.saes: the study decides it"),
        ("arms.c2r.strength=3", r"saes\.1\.strength: unknown key"),
        ("arm.c2r.k=3", r"arm: unknown key; accepted are output, run, arms"),
        ("evaluation.tokens=0", r"evaluation\.tokens: .*\(got 0\)"),
    ],
)
def test_what_is_refused_before_any_work(
    change: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"output": str(tmp_path / "out"), **RAW}))
    assert load_study(path).groups == [[0, 1], [2]]
    with pytest.raises(SystemExit):
        main(["study", str(path), "--set", change])
    import re

    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
