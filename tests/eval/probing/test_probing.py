"""Sparse probes: planted latents, brute force, and what reaches the result file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from c2r.eval.probing import evaluation as probing
from c2r.eval.probing.evaluation import KS, Task, one_vs_rest, probe, probe_all, token_means
from c2r.eval.suite import evaluate


def split(labels: Tensor) -> Tensor:
    """Every fifth text of a label is a test text."""
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        test[(labels == label).nonzero().squeeze(1)[::5]] = True
    return test


def test_token_means_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 3, generator=generator)
    text = torch.randint(0, 7, (50,), generator=generator)
    text[text == 4] = 5
    found = token_means(values.split(8), text, 8)
    for t in range(8):
        mine = values[text == t]
        torch.testing.assert_close(found[t], mine.mean(0) if len(mine) else torch.zeros(3))
    torch.testing.assert_close(token_means([values], text, 8), found)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_tasks_are_balanced_and_apart(classes: int) -> None:
    labels = torch.arange(60 * classes) % classes
    labels[:4] = -1  # texts without tokens
    test = split(labels)
    tasks = one_vs_rest(labels, test, list("abcde"[:classes]), seed=0)
    assert [task.label for task in tasks] == list("abcde"[: classes if classes > 2 else 1])
    for place, task in enumerate(tasks):
        for rows, of_half in ((task.train_R, ~test), (task.test_R, test)):
            assert of_half[rows].all()
            assert len(rows.unique()) == len(rows)
            assert (labels[rows] >= 0).all()
            assert task.positive_T[rows].double().mean() == 0.5
            assert torch.equal(task.positive_T[rows], labels[rows] == place)
            others = torch.bincount(labels[rows][labels[rows] != place], minlength=classes)
            assert others.max() <= math.ceil(len(rows) / 2 / (classes - 1))  # drawn from evenly
    again = one_vs_rest(labels, test, list("abcde"[:classes]), seed=0)
    assert all(torch.equal(a.train_R, b.train_R) for a, b in zip(tasks, again, strict=True))


def test_a_rare_label_is_the_measure() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10)
    (task,) = one_vs_rest(labels, split(labels), ["a", "b"], seed=0)
    assert (len(task.train_R), len(task.test_R)) == (16, 4)


def test_planted_latents_are_perfect_and_noise_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    acts = torch.rand(600, 30, generator=generator) * 0.1
    planted = {0: 7, 1: 22, 2: 13}
    for label, latent in planted.items():
        acts[:, latent] = torch.where(labels == label, 5.0, 0.0)
    tasks = one_vs_rest(labels, split(labels), ["a", "b", "c"], seed=0)
    accuracies, best, unconverged = probe_all(acts, tasks)
    assert set(accuracies) == {"all", *(f"top_{k}" for k in KS)}
    assert all(value == 1 for by_label in accuracies.values() for value in by_label.values())
    assert [best[name][0] for name in "abc"] == list(planted.values())
    assert unconverged == 0
    noise, _, _ = probe_all(torch.rand(600, 30, generator=generator), tasks)
    assert all(abs(value - 0.5) < 0.2 for by_label in noise.values() for value in by_label.values())


def logistic_regression(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Minimise ½‖w‖² + Σ log(1 + exp(−y·(x·w + b))) with scipy; returns (w, b)."""
    signs = 2.0 * y - 1

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = parameters[:-1], parameters[-1]
        margin = signs * (x @ weight + bias)
        pull = -signs / (1 + np.exp(margin))
        gradient = np.append(x.T @ pull + weight, pull.sum())
        return float(np.logaddexp(0, -margin).sum() + weight @ weight / 2), gradient

    return minimize(loss, np.zeros(x.shape[1] + 1), jac=True, options={"gtol": 1e-8, "maxiter": 10_000}).x


@pytest.mark.parametrize("k", [1, 2, 5, None])
def test_against_brute_force(k: int | None) -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(300) % 2
    x = rng.normal(size=(300, 12)) + np.outer(labels, rng.normal(size=12)) * 0.5
    test = split(torch.tensor(labels)).numpy()
    task = Task("b", torch.tensor((~test).nonzero()[0]), torch.tensor(test.nonzero()[0]), torch.tensor(labels == 1))
    found = probe(torch.tensor(x, dtype=torch.float32), task, k)
    train_x, train_y = x[~test], labels[~test]
    distance = [abs(np.mean(train_x[train_y == 1, c]) - np.mean(train_x[train_y == 0, c])) for c in range(12)]
    channels = list(range(12)) if k is None else sorted(range(12), key=lambda c: -distance[c])[:k]
    assert found.channels == channels
    solved = logistic_regression(train_x[:, channels], train_y)
    said = x[test][:, channels] @ solved[:-1] + solved[-1] > 0
    assert found.accuracy == pytest.approx((said == labels[test]).mean(), abs=1.01 / test.sum())
    assert 0.5 < found.accuracy < 1
    assert found.converged


def test_a_probe_that_does_not_converge_is_counted() -> None:
    x = torch.tensor(np.random.default_rng(0).normal(size=(400, 30)) * 10.0 ** np.linspace(-3, 6, 30))
    x += 10.0 ** torch.linspace(0, 6, 30)  # so badly scaled that lbfgs does not arrive
    task = Task("a", torch.arange(300), torch.arange(300, 400), torch.arange(400) % 2 == 0)
    assert not probe(x, task, None).converged
    _, _, unconverged = probe_all(x, [task])
    assert unconverged == sum(not probe(x, task, k).converged for k in (None, *KS))


def write_task(path: Path) -> Path:
    words = ("fox jumps over", "jugs of liquor")
    lines = [json.dumps({"text": f"{words[i % 2]} {i}", "label": "xy"[i % 2]}) for i in range(60)]
    path.write_text("\n".join([*lines, json.dumps({"text": "<|end|>", "label": "x"})]))
    return path


def test_the_result_file(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    folders = list(tiny_run.values())
    task, out = write_task(tmp_path / "mine.jsonl"), tmp_path / "out"
    options = {"suites": ("probing",), "probe_data": str(task), "cache": tmp_path / "cache"}
    options["data"] = {"parse_special_tokens": True}  # so that a text of <|end|> has no token that counts
    results = evaluate(folders, out, **options)
    (kept,) = (tmp_path / "cache").glob("texts-*")
    written = kept.stat().st_mtime_ns
    assert evaluate(folders, out, **options) == results
    assert kept.stat().st_mtime_ns == written  # the language model reads the texts once
    found = json.loads((out / "c2r_sparse_probing.json").read_text())
    assert found["eval_type_id"] == "sparse_probing"
    expected = {  # SAEBench 0.6.0, evals/sparse_probing/eval_output.py
        side: {f"{side}_test_accuracy", *(f"{side}_top_{k}_test_accuracy" for k in (1, 2, 5))}
        for side in ("llm", "sae")
    }
    assert {side: set(by) for side, by in found["eval_result_metrics"].items()} == expected
    assert found["eval_result_metrics"]["llm"]["llm_test_accuracy"] == 1  # two words apart
    (detail,) = found["eval_result_details"]
    assert set(detail) == {"dataset_name"} | expected["llm"] | expected["sae"]
    assert detail["dataset_name"] == "mine"
    extra = found["eval_result_unstructured"]
    assert set(extra["mine_results"]["sae_top_1_test_accuracy"]) == {"x"}
    assert len(extra["mine_latents"]["x"]) == 5
    assert extra["mine_texts"]["labels"] == {"x": 30, "y": 30}  # the text that is all <|end|> does not count
    assert results["c2r"]["probe_top_1"] == detail["sae_top_1_test_accuracy"]
    assert found["eval_config"]["probe_data"] == str(task)


def test_texts_without_tokens_are_refused(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    folders = list(tiny_run.values())
    task = tmp_path / "mine.jsonl"
    lines = [{"text": "<|end|>" * (i + 1) if i % 2 else f"word {i}", "label": i % 2} for i in range(60)]
    task.write_text("\n".join(map(json.dumps, lines)))
    data = {"parse_special_tokens": True}
    results = evaluate(folders, suites=("probing",), probe_data=str(task), cache=tmp_path / "cache", data=data)
    assert len(results.failed) == 2
    assert all("texts of label '1' contain no token" in line for line in results.failed)
    with pytest.raises(ValueError, match="probe_data: no file matches"):
        evaluate(folders, suites=("probing",), probe_data=str(tmp_path / "none.jsonl"))


def test_the_standard_librarys_tasks(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [
        task._replace(texts={label: texts[:30] for label, texts in list(task.texts.items())[:3]})
        for task in probing.stdlib_tasks()
    ]
    monkeypatch.setattr(probing, "stdlib_tasks", lambda seed: few)
    folders = list(tiny_run.values())
    results = evaluate(folders, suites=("probing",), cache=tmp_path / "cache")
    assert all(0.3 < value <= 1 for figures in results.values() for value in figures.values() if value is not None)
    assert not math.isnan(results["c2r"]["probe_dense"] or math.nan)
    detail = json.loads((tmp_path / "run" / "evaluations" / "c2r_sparse_probing.json").read_text())
    assert [part["dataset_name"] for part in detail["eval_result_details"]] == [task.name for task in few]
