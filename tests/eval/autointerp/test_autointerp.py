"""Autointerp against judges whose score is known: one that sees through every latent, one that tosses coins, others.

The text is words drawn at random, a token each; latent i fires on word i.
"""

import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from builders import TEXT, bench_of
from c2r.cli import main
from c2r.config.evaluations import JudgeConfig, Patience
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.autointerp.detection import Nonsense, read_explanation, read_numbers
from c2r.eval.autointerp.evaluation import run_autointerp
from c2r.eval.bench import Bench, TextActivations
from c2r.eval.outcome import Outcome
from c2r.language_model.model import LanguageModel
from c2r.sae.model import SAE
from stub_judge import Reply, StubJudge, coin, fault, oracle, question_of, said

WORDS, TOKENS = 60, 9600
SECRET = "sk-secret-0123456789"
NAMES = [a + b for a in "bcdfghklmn" for b in ("a", "e", "i", "o", "u", "an")]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("C2R_JUDGE_KEY", SECRET)


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(NAMES)}, unk_token=NAMES[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def bench_at(url: str, cache: Path, **judge: Any) -> Bench:
    """A text of `TOKENS` random words in rows of 64, x the word's one-hot vector times a random strength."""
    patience = Patience(timeout=5.0, attempts=3, first_wait=0.01)
    config = JudgeConfig(url=url, model="stub", **{"latents": 12, "patience": patience, **judge})
    lm = LanguageModel.__new__(LanguageModel)  # of which only the tokenizer is used
    lm.tokenizer = word_tokenizer()
    bench = bench_of(lm, ModelConfig(), DataConfig(), TOKENS, 0, cache, judge=config)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, WORDS, TOKENS))
    strength = torch.from_numpy(rng.uniform(0.5, 2.0, TOKENS).astype(np.float32))
    x_nD = torch.nn.functional.one_hot(ids, WORDS) * strength[:, None]
    place = torch.arange(TOKENS)
    bench.__dict__["activations"] = TextActivations(x_nD, ids, place // 64, place % 64)
    return bench


def word_sae(bias: float = 0.0) -> SAE:
    eye = torch.eye(WORDS)
    return SAE(eye, torch.full((WORDS,), bias), eye, torch.zeros(WORDS), architecture="standard")


def outcome_of(bench: Bench) -> Outcome:
    (outcome,) = run_autointerp(bench, {"sae": word_sae()})
    return outcome


def test_a_judge_that_sees_through_has_score_1(tmp_path: Path) -> None:
    with StubJudge(oracle) as stub:
        bench = bench_at(stub.url, tmp_path)
        outcome = outcome_of(bench)
        assert outcome.error is None
        assert outcome.metrics["autointerp"] == {"autointerp_score": 1.0, "autointerp_std_dev": 0.0}
        assert outcome.metrics["detection"] == {
            "balanced_accuracy": 1.0,
            "true_positive_rate": 1.0,
            "true_negative_rate": 1.0,
            "score_of_naming_none": 10 / 14,
        }
        assert outcome.metrics["latents"] == {"alive": WORDS, "passed_over": 0, "scored": 12, "failed": 0}
        assert outcome.summary == {"autointerp": 1.0, "autointerp_balanced": 1.0}
        assert len(stub.bodies) == 24
        for latent in outcome.details:
            assert latent["explanation"] == NAMES[latent["latent"]]
            for window in latent["windows"]:
                assert window["fires"] == (NAMES[latent["latent"]] in window["text"].split())
        # Nothing that is scored was shown with the explanation.
        for latent in outcome.details:
            (shown,) = [q for e, q in map(question_of, stub.bodies) if e is None and f"⟦{latent['explanation']}" in
                        " ".join(q).replace("⟦ ", "⟦")]  # fmt: skip
            seen = {window.replace("⟦", "").replace("⟧", "") for window in shown}
            assert not seen.intersection(window["text"] for window in latent["windows"])
        # A rerun asks nothing, and finds the same.
        again = outcome_of(bench_at(stub.url, tmp_path))
        assert (again.metrics, again.details) == (outcome.metrics, outcome.details)
        assert len(stub.bodies) == 24
        # A larger sample asks for the new latents alone.
        assert outcome_of(bench_at(stub.url, tmp_path, latents=15)).summary["autointerp"] == 1.0
        assert len(stub.bodies) == 30
    assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_judge_that_tosses_coins(tmp_path: Path) -> None:
    with StubJudge(coin) as stub:
        metrics = outcome_of(bench_at(stub.url, tmp_path, latents=60)).metrics
    # 60 · 14 coins: a standard deviation of 0.017; of the balanced accuracy, 60 · 4 and 60 · 10, 0.019.
    assert abs(metrics["autointerp"]["autointerp_score"] - 0.5) < 0.07
    assert abs(metrics["detection"]["balanced_accuracy"] - 0.5) < 0.08
    assert 0.5 * (0.25 / 14) ** 0.5 < metrics["autointerp"]["autointerp_std_dev"] < 2 * (0.25 / 14) ** 0.5


@pytest.mark.parametrize(("answer", "score"), [("None", 10 / 14), (", ".join(map(str, range(1, 15))), 4 / 14)])
def test_judges_that_look_at_nothing(answer: str, score: float, tmp_path: Path) -> None:
    with StubJudge(lambda _, body: said("x" if question_of(body)[0] is None else answer)) as stub:
        metrics = outcome_of(bench_at(stub.url, tmp_path)).metrics
    assert metrics["autointerp"]["autointerp_score"] == pytest.approx(score)
    assert metrics["autointerp"]["autointerp_std_dev"] == pytest.approx(0.0)
    assert metrics["detection"]["balanced_accuracy"] == 0.5


def test_requests_under_way_are_several_and_bounded(tmp_path: Path) -> None:
    with StubJudge(lambda number, body: oracle(number, body)._replace(delay=0.03)) as stub:
        outcome_of(bench_at(stub.url, tmp_path, workers=3))
    assert 1 < stub.most_under_way <= 3


def test_the_budget_comes_first(tmp_path: Path) -> None:
    with StubJudge(oracle) as stub:
        bench = bench_at(stub.url, tmp_path, max_requests=47)
        bench.console = Console(width=200, file=io.StringIO())
        first, second = run_autointerp(bench, {"a": word_sae(), "b": word_sae(-0.7)})
        assert first.error == second.error == "judge.max_requests: got 47, but 48 are needed; no request was sent"
        assert stub.bodies == []
        shown = bench.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert "48 requests, about " in shown
        assert "0 answers are already on disk" in shown
        estimate = int(shown.split("about ")[1].split(" input tokens")[0].replace(",", ""))
        assert all(outcome.error is None for outcome in run_autointerp(
            bench_at(stub.url, tmp_path, max_requests=48), {"a": word_sae(), "b": word_sae(-0.7)}))  # fmt: skip
        sent = sum(len(message["content"]) for body in stub.bodies for message in body["messages"])
        assert len(stub.bodies) == 48
        assert estimate == pytest.approx(sent / 4, rel=0.15)
        # What is kept is not counted again.
        bench = bench_at(stub.url, tmp_path, max_requests=1)
        assert outcome_of(bench).error is None


def test_faults_that_pass_change_nothing(tmp_path: Path) -> None:
    bad = [fault(429, retry_after="0"), fault(429), fault(500), said("lost", cut=-1), said("cut", cut=10)]

    def moody(number: int, body: dict[str, Any]) -> Reply:
        return bad[number % 5] if number % 3 == 0 else oracle(number, body)

    with StubJudge(moody) as stub:
        outcome = outcome_of(bench_at(stub.url, tmp_path, patience=Patience(timeout=5.0, attempts=8, first_wait=0.01)))
    assert outcome.metrics["autointerp"]["autointerp_score"] == 1.0
    assert outcome.metrics["latents"]["failed"] == 0
    assert len(stub.bodies) > 24


def test_nonsense_is_a_failed_latent_and_no_score(tmp_path: Path) -> None:
    nonsense = [said("perhaps the third"), Reply(b"<html>"), said(""), said("99"), fault(400, "filtered")]
    failing: dict[str, Reply] = {}

    def some(number: int, body: dict[str, Any]) -> Reply:
        explanation, _ = question_of(body)
        if explanation is None:
            return oracle(number, body)
        if len(failing) < 5:
            failing.setdefault(explanation, nonsense[len(failing)])
        return failing.get(explanation) or oracle(number, body)

    with StubJudge(some) as stub:
        outcome = outcome_of(bench_at(stub.url, tmp_path, workers=1))
    assert outcome.metrics["latents"] == {"alive": WORDS, "passed_over": 0, "scored": 7, "failed": 5}
    assert outcome.metrics["autointerp"]["autointerp_score"] == 1.0
    failed = [latent for latent in outcome.details if "failed" in latent]
    assert all("score" not in latent for latent in failed)
    reasons = " | ".join(latent["failed"] for latent in failed)
    for reason in (
        "not a list of numbers: 'perhaps",
        "not a chat completion",
        "no text",
        "excerpt 99 of 14",
        "filtered",
    ):
        assert reason in reasons


def test_if_most_latents_fail_there_is_no_result(tmp_path: Path) -> None:
    with StubJudge(lambda n, body: oracle(n, body) if question_of(body)[0] is None else said("hm")) as stub:
        outcome = outcome_of(bench_at(stub.url, tmp_path))
    assert outcome.metrics == {}
    assert outcome.error == (
        "no score, because the judge failed on 12 of 12 latents: the answer is not a list of numbers: 'hm'"
    )


def test_a_wrong_key_ends_it_at_once(tmp_path: Path) -> None:
    with StubJudge(lambda *_: fault(401, "bad key")) as stub:
        outcomes = list(run_autointerp(bench_at(stub.url, tmp_path, workers=2), {"a": word_sae(), "b": word_sae()}))
    for outcome in outcomes:
        assert "the API key was rejected; set C2R_JUDGE_KEY" in (outcome.error or "")
        assert "a rerun resumes" in (outcome.error or "")
    assert len(stub.bodies) <= 3


def test_without_a_judge(tmp_path: Path) -> None:
    bench = bench_at("http://localhost:1/v1", tmp_path)
    bench.config = bench.config.model_copy(update={"judge": None})
    assert "judge: not given" in (outcome_of(bench).error or "")


def test_an_sae_without_windows_leaves_the_other(tmp_path: Path) -> None:
    with StubJudge(oracle) as stub:
        dead, good = run_autointerp(bench_at(stub.url, tmp_path), {"dead": word_sae(-9.0), "good": word_sae()})
    assert "too few windows to judge any latent; no latent fires" in (dead.error or "")
    assert good.summary["autointerp"] == 1.0


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_was_answered(tmp_path: Path) -> None:
    def interrupting(number: int, body: dict[str, Any]) -> Reply:
        if number == 9:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        return oracle(number, body)._replace(delay=0.2 if number >= 9 else 0.0)

    with StubJudge(interrupting) as stub:
        with pytest.raises(KeyboardInterrupt):
            outcome_of(bench_at(stub.url, tmp_path, workers=2))
        asked = len(stub.bodies)
        assert 9 < asked < 24
        assert len(list((tmp_path / "judge").iterdir())) == asked  # also those that were under way
        assert outcome_of(bench_at(stub.url, tmp_path)).summary["autointerp"] == 1.0
        assert len(stub.bodies) == 24


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("2, 5, 14", {2, 5, 14}),
        ("None", set()),
        ("none.", set()),
        ("[]", set()),
        ("[2, 5]", {2, 5}),
        ("`3`", {3}),
        ("2 and 5.", {2, 5}),
        ("1., 3.", {1, 3}),
        ("Answer: 1, 1, 3", {1, 3}),
        ("Excerpts 4, 6", {4, 6}),
        ("<think>is it 7?\nNone?</think>\n8\n9", {8, 9}),
    ],
)
def test_answers_that_are_read(answer: str, numbers: set[int]) -> None:
    assert read_numbers(answer, 14) == numbers


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " , ",
        "I think 3",
        "0",
        "15",
        "-3",
        "2-5",
        "3.5",
        "{}",
        '{"a": 3}',
        "[1, [2]]",
        "yes",
        "²",
        "9" * 5000,
        "and",
    ],
)
def test_answers_that_say_nothing(answer: str) -> None:
    with pytest.raises(Nonsense):
        read_numbers(answer, 14)


def test_explanations() -> None:
    assert read_explanation("<think>hm</think> the word\n  dog ") == "the word dog"
    for answer in ("", "<think>hm</think>", "x" * 1001):
        with pytest.raises(Nonsense, match="characters; accepted are 1 to 1,000"):
            read_explanation(answer)


def test_from_the_command_line(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Trained, judged and tabulated; the key is in no file and no output, though the endpoint repeats it."""
    monkeypatch.setenv("C2R_CACHE", str(tmp_path / "cache"))
    text, words = tmp_path / "text.txt", TEXT.replace(".", "").replace(",", "").split()
    text.write_text(" ".join(np.random.default_rng(0).choice(words, 6000)))
    arguments = ["eval", *map(str, tiny_run.values()), "--suite", "splitting,autointerp", "--path", str(text),
                 "--tokens", "4000", "--out", str(tmp_path / "out")]  # fmt: skip
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--judge-url, --judge-model: not given" in capsys.readouterr().err

    def leaky(number: int, body: dict[str, Any]) -> Reply:
        explanation, _ = question_of(body)
        return said(f"{SECRET} is what it fires on" if explanation is None else "1, 2") if number % 7 else fault(
            400, f"is {SECRET} your key?")  # fmt: skip

    with StubJudge(leaky) as stub:
        judged = ["--judge-url", stub.url, "--judge-model", "stub", "--judge-latents", "4",
                  "--judge-options", '{"temperature": 0}']  # fmt: skip
        main(arguments + judged)
        asked = len(stub.bodies)
        assert 12 <= asked <= 16
        assert all(body["temperature"] == 0 for body in stub.bodies)
        assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in stub.headers)
    printed = capsys.readouterr()
    assert "autointerp (share of windows judged correctly)" in printed.out
    assert "16 requests, about" in " ".join(printed.err.split())
    assert SECRET not in printed.out + printed.err
    result = json.loads((tmp_path / "out" / "c2r_autointerp.json").read_text())
    assert result["eval_type_id"] == "autointerp"
    assert set(result["eval_result_metrics"]["autointerp"]) == {"autointerp_score", "autointerp_std_dev"}
    assert result["eval_config"]["judge"] == {"url": stub.url, "model": "stub", "options": {"temperature": 0}}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    assert any(b"[key]" in path.read_bytes() for path in files)
