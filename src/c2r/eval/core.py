"""Core evaluation: fidelity, sparsity and health of SAEs on text, with sums in float64.

BOS, EOS and padding are ignored throughout: they are not reconstructed, not ablated and not scored. Outliers are tokens
whose norm is above the limit used in the SAE's training (`c2r.activations.counting`). They keep their original
activations in the spliced and ablated passes, and do not enter the SAE's figures of reconstruction and sparsity; the
same figures over all tokens are reported in addition. SAEs are evaluated in their inference form (batch-top-k with its
learned threshold).

R rows · T positions in a row · D width of the activations · F latents · V vocabulary · n real tokens of a batch ·
c tokens that are not outliers · p positions in a piece of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from rich.markup import escape
from torch import Tensor
from torch.nn import functional as F

from c2r.activations.counting import Counting, counting_of
from c2r.eval.bench import Bench
from c2r.eval.fidelity import Fidelity
from c2r.eval.outcome import FAILURES, Outcome, failure
from c2r.eval.results import Histogram, Metrics, histogram
from c2r.language_model.model import LanguageModel
from c2r.language_model.passes import Pass, Passes
from c2r.neighbors import nearest_neighbors
from c2r.progress import progress_bar
from c2r.sae.model import SAE
from c2r.text.packing import Rows

_CATEGORIES = {
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "fvu", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}
_WITH_OUTLIERS = ("explained_variance", "fvu", "mse", "cossim", "l0", "l1", "frac_alive")


class CoreResult(NamedTuple):
    """The core evaluation of one SAE."""

    core: Metrics
    """Figures in SAEBench's categories, and in the category `with_outliers`."""
    density: Histogram
    """log10 of P(z > 0) of latents that are not dead."""


class Behaviour:
    """Sums of cross-entropy and KL against the clean model for one way of replacing the hook's output."""

    def __init__(self) -> None:
        self.ce = self.kl = 0.0

    def add(self, score: Tensor) -> None:
        """Add the sums returned by `Reference.score`."""
        ce, kl = score.tolist()
        self.ce += ce
        self.kl += kl


class Reference:
    """Predictions of the clean model at p positions, with which other passes are compared.

    Arguments:
        logits_pV: fp32 logits of the clean model.
        next_p: the token that follows each position.
        followed_p: bool, whether that token is a real one; cross-entropy is computed only there.
    """

    def __init__(self, logits_pV: Tensor, next_p: Tensor, followed_p: Tensor) -> None:
        self.log_pV = logits_pV.log_softmax(-1)
        self.probabilities_pV = self.log_pV.exp()
        self.next_p, self.followed_p = next_p, followed_p

    def clean(self) -> Tensor:
        """Sums of cross-entropy and KL, float64 `[2]`, of the clean model itself."""
        ce = self._cross_entropy(self.log_pV)
        return torch.stack([ce, torch.zeros_like(ce)])

    def score(self, logits_pV: Tensor) -> Tensor:
        """The same sums for another pass with these fp32 logits; KL is relative to the clean model."""
        log_pV = logits_pV.log_softmax(-1)
        ce = self._cross_entropy(log_pV)
        minus_kl_p = log_pV.sub_(self.log_pV).mul_(self.probabilities_pV).sum(-1)
        return torch.stack([ce, -minus_kl_p.double().sum()])

    def _cross_entropy(self, log_pV: Tensor) -> Tensor:
        at_next_p = log_pV.gather(-1, self.next_p[:, None])[:, 0]
        return -at_next_p[self.followed_p].double().sum()


class Ablation(NamedTuple):
    """A pass with the hook's output set to 0 at some of the real positions."""

    counts_n: Tensor
    """Bool: which ones."""
    final: Tensor
    """Final hidden state."""


class Subject:
    """Running sums of one SAE under evaluation."""

    def __init__(self, sae: SAE) -> None:
        self.sae, self.counting = sae, counting_of(sae.config)
        self.counted, self.outliers = (Fidelity(sae.width, sae.d_in) for _ in range(2))
        self.spliced, self.zero = Behaviour(), Behaviour()

    def splice(self, first: Pass, x_nD: Tensor, counts_n: Tensor) -> Tensor:
        """Count the activations of real tokens, and return the final hidden state with the SAE's output spliced in."""
        x_hat_cD = self.counted.reconstruct(self.sae, x_nD[counts_n])
        self.outliers.reconstruct(self.sae, x_nD[~counts_n])
        hidden_RTD = first.hidden_RTD.clone()
        hidden_RTD[_at(first.scored_RT, counts_n)] = x_hat_cD.to(hidden_RTD.dtype)
        return first.final(hidden_RTD)

    def result(self, clean: Behaviour, positions: int, followed: int) -> CoreResult:
        """All figures of this SAE.

        Raises:
            ValueError: every token is an outlier.
        """
        if self.counted.tokens == 0:
            raise ValueError(
                f"all {self.outliers.tokens:,} tokens are outliers: their norms exceed {self.counting.max_norm:.4g}, "
                "the limit in the SAE's cfg.json (c2r.state.max_norm). Was it trained on another language model?"
            )
        figures = self.counted.metrics() | _neighbor_cosines(self.sae)
        everything = self.counted.joined(self.outliers).metrics()
        metrics = _in_categories(figures, self.spliced, clean, self.zero, positions, followed) | {
            "with_outliers": {
                "total_tokens": everything["tokens"],
                "outlier_tokens": self.outliers.tokens,
                **{name: everything[name] for name in _WITH_OUTLIERS},
            }
        }
        return CoreResult(metrics, histogram(self.counted.density_F.log10(), -6, 0))


@torch.no_grad()
def evaluate_core(
    lm: LanguageModel,
    saes: dict[str, SAE],
    rows: Iterable[Rows],
    *,
    progress: Callable[[float], None] = lambda tokens: None,
    failed: dict[str, Exception] | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, CoreResult]:
    """Evaluate SAEs on the same rows. All share the model's clean pass, which gives the activations at the hook point;
    SAEs with the same outliers also share the zero-ablated pass. A result does not depend on the other SAEs.

    Arguments:
        progress: called with the number of further tokens that are done; parts of a batch count as fractions.
        failed: receives the errors of SAEs that fail, while the others complete; None: the first error is raised.
        say: called with a note if a model does not support an optimisation, see `Passes`.

    Raises:
        ValueError: an SAE of another width than the model's activations, or rows without a real token.
    """
    for name, sae in saes.items():
        if sae.d_in != lm.d_in:
            raise ValueError(f"{name}: the SAE reads activations of width {sae.d_in}, the model's have {lm.d_in}")
    subjects, clean = {name: Subject(sae) for name, sae in saes.items()}, Behaviour()
    positions = followed = 0

    def drop(name: str, error: Exception) -> None:
        if failed is None:
            raise error
        failed[name] = error.with_traceback(None)  # the traceback would keep tensors alive
        del subjects[name]

    for first in _passes(lm, rows, say):
        real_RT = first.scored_RT
        followed_RT = F.pad(real_RT[:, :-1] & real_RT[:, 1:], (0, 1))
        next_n, followed_n = first.ids_RT.roll(-1, 1)[real_RT], followed_RT[real_RT]
        positions, followed = positions + len(next_n), followed + int(followed_n.sum())
        share = len(next_n) / (len(subjects) + 2)
        x_nD = first.hidden_RTD[real_RT].float()
        spliced: dict[str, Tensor] = {}
        ablations: list[Ablation] = []
        ablated: dict[str, int] = {}
        for name, subject in list(subjects.items()):
            try:
                counts_n = subject.counting.of(x_nD)
                spliced[name] = subject.splice(first, x_nD, counts_n)
                ablated[name] = _ablation(first, counts_n, ablations)
            except FAILURES as error:
                drop(name, error)
            progress(share)
        for at, logits in first.pieces():
            reference = Reference(logits(first.clean), next_n[at], followed_n[at])
            clean.add(reference.clean())
            zero = [reference.score(logits(ablation.final)) for ablation in ablations]
            for name, subject in list(subjects.items()):
                try:
                    subject.spliced.add(reference.score(logits(spliced[name])))
                    subject.zero.add(zero[ablated[name]])
                except FAILURES as error:
                    drop(name, error)
        progress(2 * share)
        if not subjects:
            return {}
    if followed == 0:
        raise ValueError("data: the evaluation's text holds no token besides BOS, EOS and padding")
    results: dict[str, CoreResult] = {}
    for name, subject in list(subjects.items()):
        try:
            results[name] = subject.result(clean, positions, followed)
        except FAILURES as error:
            drop(name, error)
    return results


def run_core(bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """Run the core evaluation on the bench's text, for all SAEs in one pass."""
    failed: dict[str, Exception] = {}
    with progress_bar(bench.console) as bar:
        task = bar.add_task("core evaluation", total=bench.config.tokens, unit="tokens")
        results = evaluate_core(
            bench.lm,
            saes,
            bench.rows(),
            progress=lambda count: bar.advance(task, count),
            failed=failed,
            say=lambda note: bench.console.print(f"[yellow]{escape(note)}[/]"),
        )
    for name, error in failed.items():
        yield failure(name, "core", error)
    for name, result in results.items():
        every = result.core["with_outliers"]
        seen = int(every["total_tokens"])
        if seen < bench.config.tokens:
            bench.console.print(
                f"[yellow]{escape(name)}: the text ended after {seen:,} of {bench.config.tokens:,} tokens[/]"
            )
        counting = counting_of(saes[name].config)
        if note := _of_outliers(result, counting):
            bench.console.print(f"[yellow]{escape(name)}: {note}[/]")
        yield Outcome(
            name,
            "core",
            result.core,
            {
                "ev": result.core["reconstruction_quality"]["explained_variance"],
                "ce_recovered": result.core["model_performance_preservation"]["ce_loss_score"],
                "l0": result.core["sparsity"]["l0"],
                "alive": result.core["misc_metrics"]["frac_alive"],
            },
            config={"tokens": seen},
            unstructured={
                "log10_density": result.density,
                "counting": {
                    "tokens_counted": int(seen - every["outlier_tokens"]),
                    "outlier_tokens_left_out": int(every["outlier_tokens"]),
                    "max_norm": counting.max_norm,
                },
            },
        )


def _of_outliers(result: CoreResult, counting: Counting) -> str:
    """A note on outliers for the user; empty if there are none."""
    every = result.core["with_outliers"]
    tokens, outliers = every["total_tokens"], every["outlier_tokens"]
    if not outliers:
        return ""
    return (
        f"{outliers:,} of {tokens:,} tokens ({outliers / tokens:.2%}) have a norm above {counting.max_norm:.4g} and "
        "are left out, as in training; over all tokens, EV is "
        f"{every['explained_variance']:.4f} (with_outliers in the result file)"
    )


def _passes(lm: LanguageModel, rows: Iterable[Rows], say: Callable[[str], None]) -> Iterator[Pass]:
    """The clean pass over each batch of rows that contains a real token."""
    batches = iter(rows)
    opening = next(batches, None)
    if opening is None:
        return
    passes = Passes(lm, opening.ids)
    for note in passes.notes:
        say(note)
    for part in passes.cut(itertools.chain([opening], batches)):
        if part.real.any():
            yield passes.read(part.ids, part.real)


def _ablation(first: Pass, counts_n: Tensor, ablations: list[Ablation]) -> int:
    """Index in `ablations` of the pass in which exactly the tokens `counts_n` are 0; run and appended if missing."""
    for place, ablation in enumerate(ablations):
        if torch.equal(ablation.counts_n, counts_n):
            return place
    zeroed_RTD = first.hidden_RTD.masked_fill(_at(first.scored_RT, counts_n)[..., None], 0)
    ablations.append(Ablation(counts_n, first.final(zeroed_RTD)))
    return len(ablations) - 1


def _at(real_RT: Tensor, counts_n: Tensor) -> Tensor:
    """Bool `[R, T]`: the real positions for which `counts_n` is true."""
    return real_RT.masked_scatter(real_RT, counts_n)


def _neighbor_cosines(sae: SAE) -> dict[str, float]:
    """Mean nearest-neighbour cosines over all latents, including dead ones, as in SAEBench."""
    weights = {"encoder": sae.W_enc, "decoder": sae.W_dec}
    return {f"average_max_{k}_cosine_sim": nearest_neighbors(w).cosine.mean().item() for k, w in weights.items()}


def _in_categories(
    figures: dict[str, float], sae: Behaviour, clean: Behaviour, zero: Behaviour, positions: int, followed: int
) -> Metrics:
    """The figures under SAEBench's categories and keys; a score is 1 for the clean model and 0 for zero ablation.

    KL is averaged over `positions`, cross-entropy over those that are `followed` by a real token.
    """
    ce, ce_clean, ce_zero = (behaviour.ce / followed for behaviour in (sae, clean, zero))
    kl, kl_zero = sae.kl / positions, zero.kl / positions
    return {
        "model_behavior_preservation": {
            "kl_div_score": (kl_zero - kl) / kl_zero if kl_zero else float("nan"),
            "kl_div_with_ablation": kl_zero,
            "kl_div_with_sae": kl,
        },
        "model_performance_preservation": {
            "ce_loss_score": (ce_zero - ce) / (ce_zero - ce_clean) if ce_zero != ce_clean else float("nan"),
            "ce_loss_with_ablation": ce_zero,
            "ce_loss_with_sae": ce,
            "ce_loss_without_sae": ce_clean,
        },
        **{category: {name: figures[name] for name in names} for category, names in _CATEGORIES.items()},
        "token_stats": {
            "total_tokens_eval_reconstruction": followed,
            "total_tokens_eval_sparsity_variance": int(figures["tokens"]),
        },
    }
