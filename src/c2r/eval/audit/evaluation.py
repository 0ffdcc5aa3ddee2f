"""The audit of one SAE: findings in plain words, pairs of latents to read, and what was not examined."""

from __future__ import annotations

from functools import partial

from rich.markup import escape

from c2r.activations.counting import LeftOut
from c2r.eval.audit.findings import findings, look
from c2r.eval.bench import Bench
from c2r.eval.counted import counted
from c2r.eval.outcome import Outcome, each
from c2r.eval.results import histogram
from c2r.eval.splitting.reading import pairs_to_read
from c2r.progress import progress_bar
from c2r.sae.model import SAE

NOT_LOOKED_AT = (
    "How well the language model works with the reconstruction (CE recovered, KL): c2r eval --suite core.",
    "Whether more specific latents fire instead of general ones (absorption): c2r eval --suite absorption.",
    "Whether latents correspond to concepts that people can name: c2r eval --suite probing,autointerp.",
    "Whether another seed finds the same latents: c2r eval --suite stability, with SAEs that differ only in the seed.",
    "Other text and other hook points of the model; the co-firing of latents that are not nearest neighbours.",
)


def evaluate_audit(bench: Bench, name: str, sae: SAE) -> Outcome:
    """Findings on the bench's text, pairs of latents to read, and what was not examined."""
    text = counted(bench, name, sae)
    with progress_bar(bench.console) as bar:
        seen = look(sae, text.x_kD, partial(bar.track, description=f"audit {escape(name)}"))
    found = findings(seen)
    return Outcome(
        name,
        "audit",
        {"audit": {key: value for finding in found for key, value in finding.figures.items()}},
        details=[finding._asdict() for finding in found],
        unstructured={
            "pairs": pairs_to_read(seen.cofiring, text.text, bench.lm.tokenizer, text.place_k),
            "not_looked_at": [*_outliers(text.left_out), *_text_of_training(bench, sae), *NOT_LOOKED_AT],
            "counting": text.left_out.figures,
            "log10_density": histogram(seen.density_F.log10(), -6, 0),
            **seen.cofiring.histograms(),
        },
    )


run_audit = each("audit", evaluate_audit)


def _outliers(left_out: LeftOut) -> list[str]:
    return [f"Outliers: {left_out}."] if left_out.outliers else []


def _text_of_training(bench: Bench, sae: SAE) -> list[str]:
    """A note for SAEs of other libraries that were evaluated on Python source, the default text."""
    if "c2r" in sae.config or bench.data.source != "stdlib":
        return []
    named = sae.config.get("metadata", {}).get("dataset_path")
    return [
        f"The text it was trained on ({named or 'its file does not say which'}): this is Python source, which may be "
        "unfamiliar to it, so latents for other text look dead. Set source and path to use other text."
    ]
