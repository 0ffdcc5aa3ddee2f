"""The evaluation `absorption`: first letters over several seeds, one result per SAE in SAEBench's format."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from c2r.activations.counting import counting_of
from c2r.config.evaluations import AbsorptionEvaluation
from c2r.eval.absorption.concepts import Absorption, ClassResult, absorption
from c2r.eval.absorption.first_letter import LETTERS, Collection, collect, counted_words, draw, words_of
from c2r.eval.bench import Bench
from c2r.eval.counted import say_left_out
from c2r.eval.outcome import FAILURES, Outcome, each, failure
from c2r.intervals import interval_95, share_interval_95
from c2r.progress import progress_bar
from c2r.sae.model import SAE

EVALUATION = "absorption_first_letter"
"""SAEBench's type id."""
_MEANS = ("absorption_fraction_score", "full_absorption_score", "num_split_features")
_FRACTION = f"mean_{_MEANS[0]}"
LEAST_PARAMETERS, LEAST_LATENTS = 1_000_000_000, 16_384
OUT_OF_DOMAIN = (
    "SAEBench does not recommend this metric for language models under 1 billion parameters or for SAEs under 16k "
    "latents: the figure is evidence neither for nor against a method"
)


def run_absorption(
    bench: Bench,
    saes: dict[str, SAE],
) -> Iterator[Outcome]:
    """Evaluate first-letter absorption of each SAE; activations and ground-truth probes are shared by all."""
    settings = bench.config.absorption
    kind = settings.prompts.words or ("spaced" if bench.model.name == "embedded" else "all")
    settings = settings.model_copy(update={"prompts": settings.prompts.model_copy(update={"words": kind})})
    try:
        words = words_of(bench.lm.tokenizer, kind)
        what = "words with a leading space" if kind == "spaced" else "vocabulary entries"
        bench.console.print(f"first letters of {len(words):,} {what}, {settings.seeds} seeds", highlight=False)
        seeds = range(bench.config.seed, bench.config.seed + settings.seeds)
        for seed in seeds:
            draw(list(words), settings.prompts, seed)  # raises before any long computation
        collections = [collect(bench, words, settings.prompts, seed) for seed in seeds]
    except FAILURES as error:
        yield from (failure(name, EVALUATION, error) for name in saes)
        return
    yield from each(EVALUATION, partial(_evaluate, collections, settings))(bench, saes)


def _evaluate(
    collections: list[Collection], settings: AbsorptionEvaluation, bench: Bench, name: str, sae: SAE
) -> Outcome:
    results, left_out = [], []
    with progress_bar(bench.console) as bar:
        for whole in bar.track(collections, description=f"absorption {name}"):
            part, outliers = counted_words(bench, whole, counting_of(sae.config))
            say_left_out(bench.console, f"{name}, evaluation seed {part.seed}", outliers)
            left_out.append({"seed": part.seed, **outliers.figures})
            given = {"settings": settings.thresholds, "probe": part.probe, "seed": part.seed}
            results.append(absorption(part.data, sae, LETTERS, **given))
    found = outcome(name, [part.seed for part in collections], results, settings)
    outside = domain(sum(weight.numel() for weight in bench.lm.model.parameters()), sae.width)
    found.unstructured |= {"counting": left_out, "domain": outside}
    found.summary["absorption_in_domain"] = float(outside is None)
    if found.unstructured["reason"]:
        bench.console.print(f"[yellow]{name}: absorption cannot be evaluated; {found.unstructured['reason']}[/]")
    return found


def domain(parameters: int | None, latents: int) -> str | None:
    """Why the metric is no evidence for or against a method here; None if it is recommended.

    SAEBench recommends it for language models with at least a billion parameters and SAEs with at least 16k latents.

    Arguments:
        parameters: number of the language model's parameters; None: unknown.
        latents: number of the SAE's latents.
    """
    below = []
    if parameters is not None and parameters < LEAST_PARAMETERS:
        below.append(f"the language model has {parameters / 1e6:,.0f} M parameters")
    if latents < LEAST_LATENTS:
        below.append(f"the SAE has {latents:,} latents")
    if not below:
        return None
    return f"{' and '.join(below)}; {OUT_OF_DOMAIN}"


def outcome(name: str, seeds: Sequence[int], results: Sequence[Absorption], settings: AbsorptionEvaluation) -> Outcome:
    """The combined result of all seeds; not evaluable if any seed's result is not."""
    reasons = [f"seed {seed}: {found.reason}" for seed, found in zip(seeds, results, strict=True) if found.reason]
    means = [found.means for found in results if found.means is not None]
    metrics, intervals = dict.fromkeys((f"{kind}_{m}" for kind in ("mean", "std_dev") for m in _MEANS), math.nan), {}
    if not reasons:
        metrics = {key: statistics.fmean(found[key] for found in means) for key in metrics}
        for m in _MEANS:
            interval = interval_95 if m == "num_split_features" else share_interval_95
            intervals[f"mean_{m}"] = interval([found[f"mean_{m}"] for found in means])
    fraction, full, split = (None if reasons else metrics[f"mean_{m}"] for m in _MEANS)
    low, high = intervals.get("mean_absorption_fraction_score") or (None, None)
    by_seed = {
        f"absorption_fraction_seed_{seed}": None if reasons or found.means is None else found.means[_FRACTION]
        for seed, found in zip(seeds, results, strict=True)
    }
    return Outcome(
        name,
        EVALUATION,
        {"mean": metrics},
        {
            "absorption_fraction": fraction,
            "absorption_fraction_low": low,
            "absorption_fraction_high": high,
            **by_seed,
            "full_absorption": full,
            "split_features": split,
            "letters": min(len(found.passing) for found in results),
        },
        config=settings.model_dump(),
        details=[
            {"seed": seed, **_detail(letter)}
            for seed, found in zip(seeds, results, strict=True)
            for letter in found.passing
            if not reasons
        ],
        unstructured={
            "evaluable": not reasons,
            "reason": "; ".join(reasons) or None,
            "interval_95_over_seeds": intervals,
            "seeds": [
                {"seed": seed, **(found.means or {}), "letters": [letter._asdict() for letter in found.classes]}
                for seed, found in zip(seeds, results, strict=True)
            ],
        },
    )


def _detail(letter: ClassResult) -> dict[str, str | float | int | None]:
    """One letter's result under SAEBench's names."""
    return {
        "first_letter": letter.name,
        "mean_absorption_fraction": letter.fraction,
        "full_absorption_rate": letter.full_rate,
        "num_full_absorption": letter.full,
        "num_probe_true_positives": letter.scored,
        "num_split_features": len(letter.split_latents),
    }
