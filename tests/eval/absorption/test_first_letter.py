"""The first-letter task: words, prompts, what is read where, and the evaluation from end to end."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.progress import Progress

from builders import bench_of, tiny_tokenizer
from c2r.config.evaluations import AbsorptionEvaluation, AbsorptionSettings, FirstLetterSettings
from c2r.config.run import ModelConfig
from c2r.config.text import DataConfig
from c2r.eval.absorption.evaluation import domain, run_absorption
from c2r.eval.absorption.first_letter import LETTERS, collect, draw, letter_of, read_activations, token_rows, words_of
from c2r.eval.bench import Bench
from c2r.eval.results import write_result
from c2r.eval.suite import evaluate
from c2r.intervals import interval_95
from c2r.language_model.model import LanguageModel, load_language_model
from c2r.sae.model import SAE

QUICK = FirstLetterSettings(max_words=700, examples=2, words_per_prompt=16)

SEED = 2
"""With it and the next, the few words of `QUICK` have every letter."""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(ModelConfig())


@pytest.fixture(scope="module")
def words(lm: LanguageModel) -> dict[str, int]:
    return words_of(lm.tokenizer, "spaced")


@pytest.fixture(scope="module")
def bench(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("letters")
    return bench_of(lm, ModelConfig(), DataConfig(), 100, SEED, folder)


def with_settings(bench: Bench, settings: AbsorptionEvaluation) -> Bench:
    return replace(bench, config=bench.config.model_copy(update={"absorption": settings}))


# Words and prompts


def test_words_are_the_alphabetic_entries_of_the_vocabulary(lm: LanguageModel) -> None:
    decoded = {lm.tokenizer.decode([i]) for i in range(len(lm.tokenizer))}
    alphabetic = {t for t in decoded if t.removeprefix(" ").isascii() and t.removeprefix(" ").isalpha()}
    assert set(words_of(lm.tokenizer, "all")) == alphabetic
    assert set(words_of(lm.tokenizer, "spaced")) == {t for t in alphabetic if t[0] == " "}


def test_entries_that_are_never_written_are_no_words() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["quickfox"])
    before = words_of(tokenizer, "all")
    assert before["quickfox"] == tokenizer.convert_tokens_to_ids("quickfox")

    class Other:
        """Its vocabulary has an entry that its own text does not give."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def get_vocab(self) -> dict[str, int]:
            return tokenizer.get_vocab()

        def __call__(self, texts: list[str], **given: Any) -> Any:
            return tokenizer([text.replace("quickfox", "fox") for text in texts], **given)

    assert set(before) - set(words_of(Other(), "all")) == {"quickfox"}


def test_a_decoder_that_strips_the_first_space_is_seen_through() -> None:
    class Stripping:
        """A SentencePiece tokenizer of two entries."""

        def get_vocab(self) -> dict[str, int]:
            return {"▁cat": 0, "cat": 1}

        def decode(self, ids: list[int]) -> str:
            return "cat"

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[9, 0 if " " in text else 1] for text in texts]}

    assert words_of(Stripping(), "all") == {" cat": 0, "cat": 1}
    assert words_of(Stripping(), "spaced") == {" cat": 0}


@pytest.mark.parametrize(("share", "examples"), [(1, 10), (16, 10), (7, 3), (5, 0)])
def test_examples_are_as_many_as_asked_for_and_never_the_word(share: int, examples: int, words: dict[str, int]) -> None:
    settings = FirstLetterSettings(words_per_prompt=share, examples=examples, max_words=1500)
    drawn = draw(list(words), settings, 3)
    assert drawn.train == 1200
    assert [word for group, _ in drawn.groups for word in group] == drawn.words
    assert len(set(drawn.words)) == 1500
    halves = set(drawn.words[:1200]), set(drawn.words[1200:])
    position = 0
    for group, opening in drawn.groups:
        half = halves[position >= 1200]
        position += len(group)
        lines = opening.split("\n")[1:]
        assert opening.count("\n") == len(lines) == examples
        for line in lines:
            word, _, answer = line.partition(" has the first letter:")
            assert word in half
            assert word.strip().lower() not in {other.strip().lower() for other in group}
            assert answer == " " + word.strip()[0].upper()
        assert len(set(lines)) == examples


def test_the_seed_decides_the_draw(words: dict[str, int]) -> None:
    settings = FirstLetterSettings(max_words=1500)
    assert draw(list(words), settings, 0) == draw(list(words)[::-1], settings, 0)
    assert draw(list(words), settings, 0).words != draw(list(words), settings, 1).words


def test_canonical_prompts_end_at_the_words_own_token(lm: LanguageModel, words: dict[str, int]) -> None:
    settings = FirstLetterSettings(max_words=1500)
    drawn = draw(list(words), settings, 0)
    rows = token_rows(lm.tokenizer, words, drawn, settings)
    assert rows == token_rows(lm.tokenizer, words, drawn, settings.model_copy(update={"position": -6}))
    for word, row in list(zip(drawn.words, rows, strict=True))[::100]:
        assert row[0] == lm.tokenizer.bos_token_id
        assert row[-1] == words[word]
        assert lm.tokenizer.decode(row[1:]).endswith(f"\n{word}")
    labels = [LETTERS[c] for c in drawn.labels_n.tolist()]
    assert labels == [letter_of(word).lower() for word in drawn.words]
    other = FirstLetterSettings(template="the word:{word} = starts with", max_words=1500)
    rows = token_rows(lm.tokenizer, words, draw(list(words), other, 0), other)
    assert rows[0][-1] == words[draw(list(words), other, 0).words[0]]


def test_what_does_not_fit_the_tokenizer_is_named(lm: LanguageModel, words: dict[str, int]) -> None:
    few = FirstLetterSettings(max_words=1500, position=-5)
    with pytest.raises(
        ValueError, match=r"position: the token at -5 of .* is ' has', not the token of .* 1500 of 1500 words"
    ):
        token_rows(lm.tokenizer, words, draw(list(words), few, 0), few)
    far = few.model_copy(update={"position": -500})
    with pytest.raises(ValueError, match="is missing, not the token"):
        token_rows(lm.tokenizer, words, draw(list(words), far, 0), far)
    glued = FirstLetterSettings(max_words=1500, template="x{word}x is")
    with pytest.raises(ValueError, match="choose another position or template"):
        token_rows(lm.tokenizer, words, draw(list(words), glued, 0), glued)
    for template in ("no place", "{word} {word}"):
        with pytest.raises(ValueError, match=r"accepted are texts that contain \{word\} exactly once"):
            draw(list(words), FirstLetterSettings(template=template), 0)
    with pytest.raises(
        ValueError, match=r"none of 2 training words begins with .*Z, but .* the vocabulary has 3 entries"
    ):
        draw([" ab", " cd", " ef"], FirstLetterSettings(), 0)
    without_q = [f" {letter}{i}" for letter in LETTERS.replace("q", "") for i in range(40)]
    with pytest.raises(ValueError, match=r"none of 800 training words begins with Q, but every letter .* 1000 entries"):
        draw(without_q, FirstLetterSettings(), 0)
    alphabet = [f" {letter}{i}" for letter in LETTERS for i in "abc"]
    with pytest.raises(ValueError, match="are too few for 10 examples in addition to the 16 words"):
        draw(alphabet, FirstLetterSettings(words_per_prompt=16), 1)
    with pytest.raises(ValidationError):
        FirstLetterSettings(position=0)


# Activations


@pytest.mark.parametrize("share", [1, 5])
def test_activations_are_those_of_whole_prompts(share: int, lm: LanguageModel, words: dict[str, int]) -> None:
    settings = FirstLetterSettings(words_per_prompt=share, examples=2, max_words=1500)
    drawn = draw(list(words), settings, 0)
    rows = token_rows(lm.tokenizer, words, drawn, settings)[:23]
    rows[3] = [*rows[3][:-1], 7, rows[3][-1]]  # lengths may differ within a group, and between groups
    rows[11] = [rows[11][0], 9, *rows[11][1:]]
    sizes = [share] * (23 // share) + [23 % share] * (23 % share > 0)
    with Progress(disable=True) as bar:
        found = read_activations(lm, rows, sizes, bar)
    for row, x in zip(rows, found, strict=True):
        torch.testing.assert_close(x, lm.activations(torch.tensor([row]))[0, -1], rtol=1e-4, atol=1e-4)


def test_collected_once_a_seed(bench: Bench, words: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = collect(bench, words, QUICK, SEED)
    assert len(first.data.x_train_BD) == 560
    assert len(first.data.x_test_BD) == 140
    monkeypatch.setattr(LanguageModel, "continuations", None)
    monkeypatch.setattr("c2r.eval.absorption.first_letter.one_vs_rest_probe", None)
    again = collect(bench, words, QUICK, SEED)
    assert torch.equal(first.data.x_test_BD, again.data.x_test_BD)
    assert torch.equal(first.probe.weight_CD, again.probe.weight_CD)
    with pytest.raises(TypeError):
        collect(bench, words, QUICK.model_copy(update={"examples": 3}), SEED)


# The evaluation


def dictionary(seed: int) -> SAE:
    rows = torch.nn.functional.normalize(torch.randn(32, 512, generator=torch.Generator().manual_seed(seed)), dim=1)
    return SAE(rows, torch.full((32,), -1.0), rows, torch.zeros(512), architecture="standard")


@pytest.fixture(scope="module")
def settings() -> AbsorptionEvaluation:
    return AbsorptionEvaluation(seeds=2, prompts=QUICK, thresholds=AbsorptionSettings(min_classes=10, max_k=4))


def test_one_result_an_sae_in_sae_benchs_form(bench: Bench, settings: AbsorptionEvaluation) -> None:
    found = list(run_absorption(with_settings(bench, settings), {"a": dictionary(0), "b": dictionary(1)}))
    assert [(one.sae, one.evaluation, one.error) for one in found] == [
        ("a", "absorption_first_letter", None),
        ("b", "absorption_first_letter", None),
    ]
    one = found[0]
    assert set(one.metrics["mean"]) == {  # SAEBench 0.6.0, evals/absorption/eval_output.py
        "mean_absorption_fraction_score", "mean_full_absorption_score", "mean_num_split_features",
        "std_dev_absorption_fraction_score", "std_dev_full_absorption_score", "std_dev_num_split_features",
    }  # fmt: skip
    seeds = one.unstructured["seeds"]
    assert [seed["seed"] for seed in seeds] == [SEED, SEED + 1]
    key = "mean_absorption_fraction_score"
    values = [seed[key] for seed in seeds]
    assert one.metrics["mean"][key] == one.summary["absorption_fraction"] == pytest.approx(sum(values) / 2)
    assert [one.summary[f"absorption_fraction_seed_{SEED + i}"] for i in range(2)] == values
    low, high = one.unstructured["interval_95_over_seeds"][key]
    assert (one.summary["absorption_fraction_low"], one.summary["absorption_fraction_high"]) == (low, high)
    assert (high - low) / 2 == pytest.approx(12.706 * abs(values[0] - values[1]) / 2, rel=1e-4)
    assert one.summary["letters"] >= 10
    assert "M parameters and the SAE has 32 latents; SAEBench does not recommend" in one.unstructured["domain"]
    assert one.summary["absorption_in_domain"] == 0
    assert [count["words_counted"] for count in one.unstructured["counting"]] == [700, 700]
    assert one.config["prompts"]["words"] == "spaced"
    detail = next(d for d in one.details if d["seed"] == SEED + 1)
    assert set(detail) == {
        "seed", "first_letter", "mean_absorption_fraction", "full_absorption_rate", "num_full_absorption",
        "num_probe_true_positives", "num_split_features",
    }  # fmt: skip
    for detail in one.details:
        rate = detail["num_full_absorption"] / detail["num_probe_true_positives"]
        assert detail["full_absorption_rate"] == pytest.approx(rate)
    assert len(one.details) == sum(len(seed["letters"]) for seed in seeds) - sum(
        letter["probe_f1"] <= 0.6 for seed in seeds for letter in seed["letters"]
    )


@pytest.mark.parametrize(
    ("parameters", "latents", "says"),
    [
        (10**9, 16_384, None),
        (None, 65_536, None),
        (999_999_999, 16_384, "the language model has 1,000 M parameters; SAEBench does not recommend"),
        (135_000_000, 65_536, "the language model has 135 M parameters; SAEBench does not recommend"),
        (2 * 10**9, 16_383, "the SAE has 16,383 latents; SAEBench does not recommend"),
    ],
)
def test_where_the_metric_is_recommended(parameters: int | None, latents: int, says: str | None) -> None:
    found = domain(parameters, latents)
    assert found is None if says is None else found is not None and found.startswith(says)


def test_not_evaluable_is_a_result_with_its_reason(
    bench: Bench, settings: AbsorptionEvaluation, tmp_path: Path
) -> None:
    strict = settings.model_copy(update={"thresholds": AbsorptionSettings(min_probe_f1=0.99, max_k=1)})
    (found,) = run_absorption(with_settings(bench, strict), {"a": dictionary(0)})
    assert found.error is None
    path = write_result(
        tmp_path, evaluation=found.evaluation, sae_name="a", sae_config={}, config=found.config, metrics=found.metrics
    )
    assert set(json.loads(path.read_text())["eval_result_metrics"]["mean"].values()) == {None}
    assert [found.summary[k] for k in ("absorption_fraction", "full_absorption", "split_features")] == [None] * 3
    assert found.details == []
    assert found.unstructured["evaluable"] is False
    assert f"seed {SEED}: " in found.unstructured["reason"]
    assert "of 26 classes have a ground-truth probe with F1 > 0.99; 20 are needed" in found.unstructured["reason"]


def test_a_failing_sae_stops_no_other(bench: Bench, settings: AbsorptionEvaluation) -> None:
    wide = SAE(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), architecture="standard")
    found: Iterator[Any] = run_absorption(with_settings(bench, settings), {"wide": wide, "a": dictionary(0)})
    first, second = found
    assert first.error == "ValueError: sae: it reads activations of width 8, but the samples have width 512"
    assert second.error is None


def test_a_tokenizer_without_enough_words_leaves_other_results(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    results = evaluate(list(tiny_run.values()), tmp_path / "out", suites=("absorption", "splitting"), tokens=100)
    assert len(results.failed) == 2
    assert "baseline, absorption_first_letter: ValueError: tokenizer: none of 76" in results.failed[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"baseline_splitting.json", "c2r_splitting.json"}


def test_students_interval() -> None:
    assert interval_95([0.3]) is None
    found = interval_95([1.0, 2.0, 3.0])
    assert found == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert interval_95([0.5, 0.5]) == (0.5, 0.5)
