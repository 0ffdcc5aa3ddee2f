"""What the table shows, and what it says in words."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from c2r.intervals import interval_95, paired_interval_95, share_interval_95
from c2r.report.table import ROWS, notes, print_results, summary_of_files

STARRED = (
    "max_cos_mean", "max_cos_p99", "neighbor_phi", "neighbor_jaccard", "composition_ev", "saebench_meta_structure"
)  # fmt: skip


def by_seed(*values: float | None) -> dict[str, float | None]:
    return {f"absorption_fraction_seed_{seed}": value for seed, value in enumerate(values)}


def printed(results: dict[str, dict[str, float | None]]) -> str:
    out = io.StringIO()
    print_results(results, Console(file=out, width=400))
    return out.getvalue()


def row_of(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if label in line]
    return [cell.strip() for cell in line.replace("┃", "│").split("│")][2:-1]


# Absorption, seed by seed


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        # Seeds differ by more than the SAEs do, and every seed says the same: compared unpaired nothing would be shown.
        ((0.20, 0.30, 0.40), (0.10, 0.21, 0.30), ", lower."),
        ((0.10, 0.21, 0.30), (0.20, 0.30, 0.40), ", higher."),
        ((0.20, 0.30, 0.40), (0.30, 0.25, 0.40), ", no significant difference."),
        ((0.20, 0.30, 0.40), (None, None, None), None),
        ((0.20,), (0.10,), None),
    ],
)
def test_absorption_in_words(first: Any, last: Any, said: str | None) -> None:
    rows = [
        {"name": name, "absorption_fraction": 0.1, **by_seed(*values)} for name, values in (("a", first), ("b", last))
    ]
    words = [note for note in notes(rows) if note.startswith("Absorption fraction")]
    assert len(words) == (said is not None)
    assert said is None or said in words[0]


def test_the_difference_is_paired() -> None:
    rows = [{"name": "a", **by_seed(0.20, 0.30, 0.40)}, {"name": "b", **by_seed(0.10, 0.21, 0.30)}]
    for row in rows:
        row["absorption_fraction"] = 0.3
    (said,) = [note for note in notes(rows) if note.startswith("Absorption fraction")]
    # Differences −0.10, −0.09, −0.10: mean −0.0967, deviation 0.00577, Student's quantile of 2 degrees 4.303.
    assert "b minus a" in said
    assert "3 evaluation seeds: -0.097 (95 % interval -0.111 to -0.082)" in said


def test_one_sae_is_compared_with_nothing() -> None:
    row = {"name": "a", "absorption_fraction": 0.1, **by_seed(0.1, 0.2)}
    assert not [note for note in notes([row]) if note.startswith("Absorption fraction")]


def test_intervals() -> None:
    half = 4.302653 * 0.02 / 3**0.5
    assert interval_95([0.01, 0.03, 0.05]) == pytest.approx((0.03 - half, 0.03 + half))
    assert share_interval_95([0.01, 0.03, 0.05]) == (0.0, pytest.approx(0.03 + half))
    assert share_interval_95([0.99, 0.97, 0.95]) == (pytest.approx(0.97 - half), 1.0)
    assert share_interval_95([0.3]) is None
    assert paired_interval_95([0.3, 0.5, 0.1], [0.31, 0.53, 0.15]) == pytest.approx((0.03 - half, 0.03 + half))
    with pytest.raises(ValueError, match="shorter"):
        paired_interval_95([0.1, 0.2], [0.1])


def test_an_interval_is_shown_by_its_ends() -> None:
    results = {
        "a": {"absorption_fraction": 0.03, "absorption_fraction_low": 0.0, "absorption_fraction_high": 0.0797},
        "b": {"absorption_fraction": None, "absorption_fraction_low": None, "absorption_fraction_high": None},
    }
    assert row_of(printed(results), "95 % interval") == ["0.000 to 0.080", "–", ""]


# What C²R moves by construction


def test_what_c2r_moves_by_construction_is_starred_and_the_rest_is_not() -> None:
    starred = {row.key for row in ROWS if row.label.endswith("*")}
    assert set(STARRED) <= starred
    assert not starred & {"ev", "matched_phi", "absorption_fraction", "known_absorption", "mcc", "feature_f1"}
    for key in STARRED:
        said = " ".join(notes([{"name": "a", key: 0.1}]))
        assert "moves this by construction" in said
        assert "no evidence that C²R works" in said
    assert notes([{"name": "a", "ev": 0.1, "max_cos_random_floor": float("nan")}]) == []


def test_floors_that_differ_are_all_given_whatever_the_order() -> None:
    rows = [{"name": name, "max_cos_random_floor": floor} for name, floor in (("a", 0.18), ("b", 0.12), ("c", None))]
    for some in (rows, rows[::-1]):
        assert any("of about 0.12 to 0.18 " in note for note in notes(some))
    assert any("of about 0.18 (" in note for note in notes(rows[:1]))


def test_pairs_at_one_cosine_are_explained() -> None:
    results: Any = {name: {"matched_phi": phi, "matched_cosine": 0.11} for name, phi in (("a", 0.013), ("b", 0.03))}
    text = " ".join(printed(results).split())
    assert "0.013 │ 0.030 │ +0.017" in text
    assert "nearest to 0.110, the lowest mean nearest-neighbour cosine among these SAEs" in text


# Where the metric is not recommended


def test_a_figure_outside_the_metrics_domain_says_so() -> None:
    results: Any = {
        name: {"absorption_fraction": 0.1, "absorption_in_domain": here} for name, here in (("a", 0.0), ("b", 1.0))
    }
    text = " ".join(printed(results).split())
    assert "† for a: SAEBench does not recommend this metric" in text
    assert "neither for nor against a method" in text
    assert "does not recommend" not in printed({"b": results["b"]})


def test_the_same_from_result_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        content = {
            "sae_lens_id": name,
            "eval_result_unstructured": {"summary": {"absorption_fraction": 0.1, "absorption_in_domain": 0.0}},
        }
        (tmp_path / f"{name}_absorption_first_letter.json").write_text(json.dumps(content))
    assert any("† for a, b:" in note for note in notes(summary_of_files(tmp_path, ["a", "b"])))
