"""Autointerp: a language model (the judge) explains a latent, and predicts from the explanation where it fires.

Detection scoring as in Paulo et al. 2024 (arXiv 2410.13928), with the windows and the score of SAEBench 0.6.0: the
judge reads the explanation and a shuffled list of windows, and names those in which the latent fires; the score of a
latent is the share of windows classified correctly. Differences from SAEBench: in windows labelled silent, the latent
is verified not to fire; no scored window overlaps or repeats one used for the explanation; the balanced accuracy is
reported too (naming no window is correct for 10 of 14); and an answer that cannot be parsed is counted as a failed
latent instead of being dropped.

K tokens on which a latent fires.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape

from c2r.activations.counting import LeftOut
from c2r.config.evaluations import JudgeConfig
from c2r.eval.autointerp.detection import Question, judge_latent, unanswered
from c2r.eval.autointerp.endpoint import JudgeDown
from c2r.eval.autointerp.judge import Judge
from c2r.eval.autointerp.windows import Counts, Firings, Text, marked, pick, plain
from c2r.eval.bench import Bench
from c2r.eval.counted import counted
from c2r.eval.outcome import Outcome
from c2r.progress import progress_bar
from c2r.sae.model import SAE

COUNTS = Counts()
NEEDED = "judge: not given; autointerp needs the url and the model of an OpenAI-compatible endpoint"


class Plan(NamedTuple):
    """The questions for the judge about one SAE."""

    questions: list[Question]
    alive: int
    passed_over: int
    """Latents that were drawn but skipped, because the text has too few windows for them."""
    left_out: LeftOut


class Budget(NamedTuple):
    """Number and size of the requests that are still to be sent."""

    requests: int
    """Requests, not counting retries."""
    kept: int
    """Answers already on disk."""
    tokens_in: int
    """Tokens of the requests, estimated as four characters per token."""
    tokens_out: int

    @classmethod
    def of(cls, judge: Judge, plans: list[Plan]) -> Budget:
        """The budget for all requests that `judge` has not answered yet."""
        questions = [question for plan in plans for question in plan.questions]
        asked = [(question, messages) for question in questions for messages in unanswered(judge, question)]
        characters = sum(len(message["content"]) for _, messages in asked for message in messages)
        answers = sum(2 * len(question.windows) for question, _ in asked)  # an explanation is about as long
        return cls(len(asked), 2 * len(questions) - len(asked), characters // 4, answers)

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests, about {self.tokens_in:,} input tokens and {self.tokens_out:,} output tokens "
            f"(not counting thinking); {self.kept:,} answers are already on disk"
        )


def make_plan(bench: Bench, name: str, sae: SAE, latents: int) -> Plan:
    """Draw alive latents at random, and windows of the bench's text for each.

    Windows may contain outliers, tokens that do not count; latents are treated as silent on these.

    Raises:
        ValueError: no latent has enough windows.
    """
    found = counted(bench, name, sae)
    text, firings = Text(found.text, COUNTS.radius), Firings(sae, found.text.x_nD, count_n=found.count_n)
    alive = firings.fired_F.nonzero().squeeze(1).numpy()
    questions: list[Question] = []
    passed_over, reason = 0, "no latent fires"
    for latent in np.random.default_rng(bench.config.seed).permutation(alive).tolist():
        if len(questions) == latents:
            break
        try:
            questions.append(_question(bench, text, firings, latent))
        except ValueError as error:
            passed_over, reason = passed_over + 1, f"latent {latent} has only {error}"
    if not questions:
        raise ValueError(f"tokens: {len(text.ids_n):,} tokens contain too few windows to judge any latent; {reason}")
    return Plan(questions, len(alive), passed_over, found.left_out)


def _question(bench: Bench, text: Text, firings: Firings, latent: int) -> Question:
    tokens_K, strength_K = firings.of(latent)
    examples = pick(text, tokens_K, strength_K, COUNTS, (bench.config.seed, latent))
    active = set(tokens_K[strength_K >= COUNTS.floor * strength_K.max()].tolist())
    scored = [(window, True) for window in examples.firing] + [(window, False) for window in examples.silent]
    np.random.default_rng((bench.config.seed, latent, 1)).shuffle(scored)
    tokenizer = bench.lm.tokenizer
    return Question(
        latent,
        len(tokens_K),
        [marked(tokenizer, text.ids_n[slice(*w)], (i in active for i in range(*w))) for w in examples.explain],
        [plain(tokenizer, text.ids_n[slice(*window)]) for window, _ in scored],
        [fires for _, fires in scored],
    )


def judge_plan(bench: Bench, judge: Judge, plan: Plan, name: str) -> list[dict[str, Any]]:
    """Judge the latents of a plan, `judge.config.workers` concurrently; results are as from `judge_latent`.

    If this is interrupted, pending answers are awaited and kept.

    Raises:
        JudgeDown: see `Judge.ask`.
    """
    with ThreadPoolExecutor(judge.config.workers) as pool, progress_bar(bench.console) as bar:
        futures = [pool.submit(judge_latent, judge, question) for question in plan.questions]
        try:
            for future in bar.track(as_completed(futures), len(futures), description=f"autointerp, {escape(name)}"):
                future.result()
        except BaseException:
            bench.console.print("stopping; waiting for pending answers, which are kept")
            judge.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def summarise(name: str, config: JudgeConfig, plan: Plan, found: list[dict[str, Any]]) -> Outcome:
    """The outcome for one SAE, with means over scored latents.

    Raises:
        ValueError: more latents failed than were scored.
    """
    scored = [latent for latent in found if "score" in latent]
    reasons = [latent["failed"] for latent in found if "failed" in latent]
    if len(reasons) > len(scored):
        said = "; ".join(list(dict.fromkeys(reasons))[:3])
        raise ValueError(f"no score, because the judge failed on {len(reasons)} of {len(found)} latents: {said}")
    score, hits, silences = (
        [latent[key] for latent in scored] for key in ("score", "true_positive_rate", "true_negative_rate")
    )
    balanced = (mean(hits) + mean(silences)) / 2
    fires = plan.questions[0].fires
    return Outcome(
        name,
        "autointerp",
        {
            "autointerp": {
                "autointerp_score": mean(score),
                "autointerp_std_dev": stdev(score) if len(score) > 1 else float("nan"),
            },
            "detection": {
                "balanced_accuracy": balanced,
                "true_positive_rate": mean(hits),
                "true_negative_rate": mean(silences),
                "score_of_naming_none": 1 - sum(fires) / len(fires),
            },
            "latents": {
                "alive": plan.alive,
                "passed_over": plan.passed_over,
                "scored": len(scored),
                "failed": len(reasons),
            },
        },
        {"autointerp": mean(score), "autointerp_balanced": balanced},
        config={
            "judge": {"url": config.url, "model": config.model, "options": config.options},
            "latents": config.latents,
            "windows": COUNTS._asdict(),
        },
        details=found,
        unstructured={"counting": plan.left_out.figures},
    )


def run_autointerp(bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """Explain and score a sample of each SAE's latents with the judge of `bench.config.judge`.

    Before the first request, the budget for all SAEs is printed and checked against `max_requests`.
    """
    plans: dict[str, Plan] = {}
    try:
        if bench.config.judge is None:
            raise ValueError(NEEDED)
        judge = Judge(bench.config.judge, bench.cache.folder / "judge")
    except ValueError as error:
        yield from (Outcome(name, "autointerp", error=str(error)) for name in saes)
        return
    for name, sae in saes.items():
        try:
            plans[name] = make_plan(bench, name, sae, bench.config.judge.latents)
        except ValueError as error:
            yield Outcome(name, "autointerp", error=str(error))
    budget, limit = Budget.of(judge, list(plans.values())), bench.config.judge.max_requests
    asked = (
        f"autointerp: sending windows of the text to {bench.config.judge.model} at {bench.config.judge.url}: {budget}"
    )
    bench.console.print(escape(asked), highlight=False)
    if limit is not None and budget.requests > limit:
        error = f"judge.max_requests: got {limit}, but {budget.requests} are needed; no request was sent"
        yield from (Outcome(name, "autointerp", error=error) for name in plans)
        return
    for name, plan in plans.items():
        try:
            outcome = summarise(name, bench.config.judge, plan, judge_plan(bench, judge, plan, name))
        except JudgeDown as error:
            outcome = Outcome(name, "autointerp", error=f"{error}; answers so far are kept, so a rerun resumes")
        except ValueError as error:
            outcome = Outcome(name, "autointerp", error=str(error))
        yield outcome
