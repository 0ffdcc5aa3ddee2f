"""Stability over seeds: permuted dictionaries agree wholly, random ones as the floor; what is refused or doubted."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from c2r.eval import stability
from c2r.eval.stability import agreement, doubts, matched_cosine, random_agreement
from c2r.eval.suite import evaluate
from c2r.interop.saelens import save_sae
from c2r.sae.model import SAE


def rows(seed: int, width: int = 40, d_in: int = 16) -> Tensor:
    return torch.randn(width, d_in, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, W_dec: Tensor, seed: int | None = 0, **changes: Any) -> Path:
    width, d_in = W_dec.shape
    sae = SAE(W_dec, torch.zeros(width), W_dec, torch.zeros(d_in), architecture="standard")
    ours = {
        "model": {"name": "x"},
        "data": {},
        "train": {"lr": 1.0},
        "seed": 0,
        "sae": {"name": folder.name, "seed": seed},
    }
    save_sae(sae, folder, metadata={}, c2r=ours | changes)
    return folder


def permuted(W_dec: Tensor, seed: int) -> Tensor:
    """Other order, signs and lengths; the same directions."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(W_dec), generator=generator)
    return W_dec[order] * (torch.rand(len(W_dec), 1, generator=generator) - 0.5).sign() * 3


def test_permuted_seeds_have_stability_1(tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"s{i}", permuted(rows(0), i), i) for i in range(3)]
    results = evaluate(folders, suites=("stability",))
    for name in ("s0", "s1", "s2"):
        assert results[name]["pw_mcc"] == pytest.approx(1, abs=1e-5)
    written = json.loads((tmp_path / "evaluations" / "s1_stability.json").read_text())
    assert {row["with"] for row in written["eval_result_details"]} == {"s0", "s2"}
    assert written["eval_result_metrics"]["stability"]["saes"] == 3


def test_random_dictionaries_are_at_the_floor(tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"s{i}", rows(i, 200, 32), i) for i in range(3)]
    results = evaluate(folders, suites=("stability",))
    floor = results["s0"]["pw_mcc_random"]
    assert floor is not None
    assert floor == random_agreement(200, 32)
    assert 0.3 < floor < 0.6
    for name in ("s0", "s1", "s2"):
        assert results[name]["pw_mcc"] == pytest.approx(floor, abs=0.02)


def test_each_sae_has_its_mean_with_the_others(tmp_path: Path) -> None:
    dictionaries = [rows(0), permuted(rows(0), 1), rows(5)]
    folders = [saved(tmp_path / f"s{i}", W, i) for i, W in enumerate(dictionaries)]
    results = evaluate(folders, suites=("stability",))
    apart = [matched_cosine(dictionaries[i], dictionaries[2]) for i in (0, 1)]
    assert results["s0"]["pw_mcc"] == pytest.approx((1 + apart[0]) / 2, abs=1e-5)
    assert results["s2"]["pw_mcc"] == pytest.approx(sum(apart) / 2, abs=1e-5)


def test_half_shared_dictionaries_lie_between(tmp_path: Path) -> None:
    eye = torch.eye(20)
    # In 20 dimensions: 10 shared directions, and 10 that stand at 45° to pairs of the rest.
    turned = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0))).Q
    other = eye.clone()
    other[10:, 10:] = turned
    assert agreement(eye, other) == pytest.approx((10 + 10 * matched_cosine(torch.eye(10), turned)) / 20, abs=1e-6)


def test_large_dictionaries_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = rows(0, 300, 64), torch.cat([rows(0, 300, 64)[:150], rows(1, 150, 64)])
    whole = agreement(a, b)
    monkeypatch.setattr(stability, "LARGEST", 200)
    monkeypatch.setattr(stability, "SAMPLED", 100)
    assert agreement(a, permuted(a, 3)) == pytest.approx(1, abs=1e-5)
    assert agreement(a, b) == agreement(a, b)
    assert agreement(a, b) == pytest.approx(whole, abs=0.08)
    folders = [saved(tmp_path / f"s{i}", W, i) for i, W in enumerate((a, b, rows(2, 300, 64)))]
    results = evaluate(folders, suites=("stability",))
    assert evaluate(folders[::-1], tmp_path / "turned", suites=("stability",)) == results
    written = json.loads((tmp_path / "evaluations" / "s1_stability.json").read_text())
    assert written["eval_config"]["sampled_latents"] == 100


def test_one_sae_or_two_shapes_are_refused(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", rows(0))
    (failed,) = evaluate([one], suites=("stability",)).failed
    assert "one, stability: stability needs at least two SAEs of the same shape" in failed
    failed, _ = evaluate([one, saved(tmp_path / "two", rows(0, 41))], suites=("stability",)).failed
    assert re.search(r"got \[F, D\] .*\(40, 16\).*\(41, 16\)", failed)


def test_doubts() -> None:
    def config(seed: int | None, run_seed: int = 0, **changes: Any) -> dict[str, Any]:
        sae = {"name": str(seed), "seed": seed, "c2r": None} | changes
        return {"c2r": {"model": None, "data": {"preset": "tree"}, "train": {"lr": 1}, "seed": run_seed, "sae": sae}}

    assert doubts([config(0), config(1), config(2)]) == []
    assert doubts([config(None, 0), config(None, 1), config(None, 2)]) == []
    assert doubts([config(0), config(1)]) == ["only 2 SAEs; 3 or more seeds are recommended"]
    (alike,) = doubts([config(None, 0), config(0, 1), config(2)])
    assert "seeds [0, 0, 2]" in alike
    (other,) = doubts([config(0), config(1), config(2, c2r={"strength": 0.1})])
    assert "but also in sae.c2r" in other
    assert doubts([{}, {}, {}]) == []  # SAELens folders say nothing of this


def test_doubts_are_printed(tmp_path: Path) -> None:
    said = Console(file=io.StringIO(), width=200)
    folders = [saved(tmp_path / f"s{i}", rows(i), i, train={"lr": i}) for i in range(2)]
    evaluate(folders, suites=("stability",), console=said)
    printed = said.file.getvalue()  # pyright: ignore
    assert "3 or more seeds are recommended" in printed
    assert "but also in train.lr" in printed
