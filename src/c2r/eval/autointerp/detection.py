"""The prompts for the judge, and the parsing of its answers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from c2r.eval.autointerp.endpoint import JudgeError
from c2r.eval.autointerp.judge import Judge, Messages
from c2r.eval.autointerp.windows import LINE_BREAK, MARKS

LONGEST_EXPLANATION = 1000
_ABOUT = (
    "A feature is read off the inner state of a language model. In an excerpt it fires on some tokens, or on none. "
    f"Excerpts are numbered; {LINE_BREAK} stands for a line break."
)
_EXPLAIN = (
    f"{_ABOUT} You will see excerpts in which one feature fires, the strongest first; the tokens it fires on stand "
    f"between {MARKS[0]} and {MARKS[1]}. Say what they have in common: a property of the marked tokens, or of the text "
    "around them, by which one could tell where else the feature fires. Neither so narrow that excerpts are left out, "
    "nor so wide that it would fit any text. Answer with that property alone, in at most 20 words."
)
_DETECT = (
    f"{_ABOUT} You will be told what one feature fires on, and see {{count}} excerpts. Name those in which it fires on "
    "at least one token. Answer with their numbers alone, separated by commas; if there are none, answer None."
)


class Nonsense(ValueError):
    """An answer that cannot be parsed."""


class Question(NamedTuple):
    """What the judge is shown of one latent."""

    latent: int
    fired: int
    """Number of tokens of the text on which it fires."""
    explain: list[str]
    """Windows for the explanation, with firing tokens marked."""
    windows: list[str]
    """Windows to classify, shuffled."""
    fires: list[bool]
    """Whether the latent fires in each of `windows`."""


def explain_messages(question: Question) -> Messages:
    """Messages that ask for an explanation."""
    return [{"role": "system", "content": _EXPLAIN}, {"role": "user", "content": _numbered(question.explain)}]


def detect_messages(question: Question, explanation: str) -> Messages:
    """Messages that ask in which windows the latent fires."""
    return [
        {"role": "system", "content": _DETECT.format(count=len(question.windows))},
        {"role": "user", "content": f"The feature fires on: {explanation}\n\n{_numbered(question.windows)}"},
    ]


def read_explanation(answer: str) -> str:
    """The explanation in an answer, on one line, without the model's thinking.

    Raises:
        Nonsense: it is empty or too long.
    """
    text = " ".join(_spoken(answer).split())
    if not text or len(text) > LONGEST_EXPLANATION:
        raise Nonsense(f"the explanation has {len(text):,} characters; accepted are 1 to {LONGEST_EXPLANATION:,}")
    return text


def read_numbers(answer: str, count: int) -> set[int]:
    """The window numbers, 1 to `count`, in an answer such as `2, 5`, `[2, 5]`, `2 and 5` or `None`.

    Raises:
        Nonsense: the answer has any other form.
    """
    text = _spoken(answer).strip(" \t\r\n`*\"'.")
    text = re.sub(r"^(the )?(answer|excerpt|number)s?[\s:]+", "", text, flags=re.IGNORECASE)
    listed = re.fullmatch(r"\[([^\[\]]*)\]", text)
    if text.lower() == "none" or (listed and not listed[1].strip()):
        return set()
    words = [word.strip(".") for word in re.split(r"[\s,;]+", listed[1] if listed else text)]
    numbers = [word for word in words if word and word.lower() != "and"]
    if not numbers or not all(number.isdecimal() and len(number) < 10 for number in numbers):
        raise Nonsense(f"the answer is not a list of numbers: {text[:80]!r}")
    named = {int(number) for number in numbers}
    if wrong := sorted(number for number in named if not 1 <= number <= count):
        raise Nonsense(f"the answer contains excerpt {wrong[0]} of {count}")
    return named


def judge_latent(judge: Judge, question: Question) -> dict[str, Any]:
    """Explain and score one latent. If the judge failed, there is no score, and `failed` contains the reason.

    Raises:
        JudgeDown: see `Judge.ask`.
    """
    found: dict[str, Any] = {"latent": question.latent, "fired": question.fired}
    try:
        found["explanation"] = read_explanation(judge.ask(explain_messages(question)))
        named = read_numbers(judge.ask(detect_messages(question, found["explanation"])), len(question.windows))
    except (JudgeError, Nonsense) as error:
        return {**found, "failed": str(error)}
    said = [number in named for number in range(1, len(question.windows) + 1)]
    rows = list(zip(question.windows, question.fires, said, strict=True))
    return {
        **found,
        "score": _share(claim == fires for _, fires, claim in rows),
        "true_positive_rate": _share(claim for _, fires, claim in rows if fires),
        "true_negative_rate": _share(not claim for _, fires, claim in rows if not fires),
        "windows": [{"text": text, "fires": fires, "named": claim} for text, fires, claim in rows],
    }


def unanswered(judge: Judge, question: Question) -> list[Messages]:
    """Those of a latent's two requests whose answers are not on disk, with a placeholder for an unknown explanation."""
    explain = explain_messages(question)
    answer = judge.known(explain)
    if answer is None:
        return [explain, detect_messages(question, "x" * 120)]
    try:
        detect = detect_messages(question, read_explanation(answer))
    except Nonsense:
        return []
    return [] if judge.known(detect) is not None else [detect]


def _share(outcomes: Any) -> float:
    counted = list(outcomes)
    return sum(counted) / len(counted)


def _spoken(answer: str) -> str:
    """An answer without the thinking that some models write first."""
    return answer.rpartition("</think>")[2]


def _numbered(windows: list[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(windows, 1))
