"""Core evaluation: fidelity, sparsity and health of SAEs on text, with sums in float64.

Positions that are BOS, EOS or padding are left out throughout: they are not reconstructed, not ablated and not
scored. SAEs are evaluated in their inference form (batch-top-k with its learned threshold).

R rows · T positions in a context · D width of the activations · F latents · V vocabulary · n real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.data.harvest import LanguageModel
from c2r.data.tokens import Rows
from c2r.eval.bench import FAILURES, Bench, Outcome, failure, progress_bar
from c2r.eval.results import Histogram, Metrics, histogram
from c2r.neighbors import nearest_neighbors
from c2r.sae.base import SAE

_SUMS: tuple[str, ...] = (
    "square",
    "error",
    "cosine",
    "norm_in",
    "norm_out",
    "norm_ratio",
    "inner",
    "hat_square",
    "l0",
    "l1",
)
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


class CoreResult(NamedTuple):
    """The core evaluation of one SAE."""

    core: Metrics
    """In SAEBench's categories."""
    density: Histogram
    """log10 of P(z > 0), dead latents left out."""


class Fidelity:
    """Running sums over tokens that give every figure of reconstruction, sparsity and density of one SAE."""

    def __init__(self, width: int, d_in: int) -> None:
        self.tokens = 0
        self.sum_D = torch.zeros(d_in, dtype=torch.float64)
        self.sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
        self.legacy_error, self.legacy_batches = 0.0, 0
        self.fired_F = torch.zeros(width, dtype=torch.float64)

    def add(self, x_nD: Tensor, x_hat_nD: Tensor, acts_nF: Tensor) -> None:
        """Count one batch of tokens."""
        x, x_hat = x_nD.double(), x_hat_nD.double()
        error_n, square_n = (x - x_hat).square().sum(1), x.square().sum(1)
        self.tokens += len(x)
        self.sum_D += x.sum(0).cpu()
        parts = {
            "square": square_n,
            "error": error_n,
            "cosine": F.cosine_similarity(x, x_hat, dim=1),
            "norm_in": square_n.sqrt(),
            "norm_out": x_hat.norm(dim=1),
            "norm_ratio": x_hat.norm(dim=1) / square_n.sqrt().clamp(min=1e-12),
            "inner": (x * x_hat).sum(1),
            "hat_square": x_hat.square().sum(1),
            "l0": (acts_nF != 0).sum(1),
            "l1": acts_nF.abs().sum(1, dtype=torch.float64),
        }
        for name, values in parts.items():
            self.sums[name] += values.sum().item()
        self.fired_F += (acts_nF != 0).sum(0).cpu()
        # SAEBench 0.6.0's figure, kept for comparison with published tables: per token, against the batch's mean.
        spread_n = (x - x.mean(0)).square().sum(1)
        self.legacy_error += (1 - error_n / spread_n.clamp(min=1e-12)).mean().item()
        self.legacy_batches += 1

    def metrics(self) -> dict[str, float]:
        """EV = 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ over all tokens; and the rest."""
        n = self.tokens
        mean = {name: value / n for name, value in self.sums.items()}
        variance = mean["square"] - (self.sum_D / n).square().sum().item()
        fvu = mean["error"] / variance if variance > 0 else float("nan")
        return {
            "tokens": n,
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "explained_variance_legacy": self.legacy_error / self.legacy_batches,
            "mse": mean["error"],
            "cossim": mean["cosine"],
            "l2_norm_in": mean["norm_in"],
            "l2_norm_out": mean["norm_out"],
            "l2_ratio": mean["norm_ratio"],
            "relative_reconstruction_bias": mean["hat_square"] / mean["inner"] if mean["inner"] else float("nan"),
            "l0": mean["l0"],
            "l1": mean["l1"],
            **self._densities(),
        }

    def _densities(self) -> dict[str, float]:
        density_F, figures = self.density_F, {}
        for percent in (1, 10):
            frequent = density_F > percent / 100
            share = density_F[frequent].sum() / density_F.sum().clamp(min=1e-12)
            figures[f"freq_over_{percent}_percent"] = frequent.double().mean().item()
            figures[f"normalized_freq_over_{percent}_percent"] = share.item()
        return figures | {"frac_alive": (density_F > 0).double().mean().item()}

    @property
    def density_F(self) -> Tensor:
        """P(z > 0) of each latent, `[F]`."""
        return self.fired_F / self.tokens


class Behaviour:
    """Running sums of cross-entropy and KL against the clean model for one way of replacing the hook's output."""

    def __init__(self) -> None:
        self.ce = self.kl = 0.0
        self.tokens = self.positions = 0

    def add(self, logits_RTV: Tensor, clean_RTV: Tensor, rows: Rows) -> None:
        """Score KL at every real position, cross-entropy at those whose next token is real too."""
        ids, real = rows.ids.to(logits_RTV.device), rows.real.to(logits_RTV.device)
        log_p, log_clean = (logits[real].log_softmax(-1) for logits in (logits_RTV, clean_RTV))
        followed = F.pad(real[:, :-1] & real[:, 1:], (0, 1))
        next_ids = ids.roll(-1, 1)[followed]
        self.ce += F.nll_loss(log_p[followed[real]], next_ids, reduction="sum").double().item()
        self.kl += (log_clean.exp() * (log_clean - log_p)).sum(-1).double().sum().item()
        self.tokens += int(followed.sum())
        self.positions += int(real.sum())


@torch.no_grad()
def evaluate_core(
    lm: LanguageModel,
    saes: dict[str, SAE],
    rows: Iterable[Rows],
    *,
    progress: Callable[[int], None] = lambda tokens: None,
    failed: dict[str, Exception] | None = None,
) -> dict[str, CoreResult]:
    """Evaluate SAEs on the same rows; the model's clean pass, which gives the activations, and the zero-ablated one are
    shared.

    Arguments:
        failed: takes what an SAE raises, which is then left out; None: it ends the evaluation.

    Raises:
        ValueError: an SAE of another width than the model's activations, or rows without a real token.
    """
    for name, sae in saes.items():
        if sae.d_in != lm.d_in:
            raise ValueError(f"{name}: the SAE reads activations of width {sae.d_in}, the model's have {lm.d_in}")
    saes = dict(saes)
    clean, zero = Behaviour(), Behaviour()
    fidelity = {name: Fidelity(sae.width, sae.d_in) for name, sae in saes.items()}
    spliced = {name: Behaviour() for name in saes}
    for part in rows:
        real = part.real.to(lm.device)
        if not real.any():
            continue
        seen: list[Tensor] = []
        clean_RTV = lm.logits(part.ids, _keep(seen, real))
        clean.add(clean_RTV, clean_RTV, part)
        zero.add(lm.logits(part.ids, lambda h, real=real: h.masked_fill(real[..., None], 0)), clean_RTV, part)
        x_nD = seen[0]
        for name, sae in list(saes.items()):
            try:
                acts_nF = sae.encode(x_nD)
                x_hat_nD = sae.decode(acts_nF)
                fidelity[name].add(x_nD, x_hat_nD, acts_nF)
                spliced[name].add(lm.logits(part.ids, _splice(x_hat_nD, real)), clean_RTV, part)
            except FAILURES as error:
                if failed is None:
                    raise
                failed[name] = error.with_traceback(None)  # which would keep its tensors
                del saes[name]
        progress(int(part.real.sum()))
    if clean.tokens == 0:
        raise ValueError("data: the evaluation's text holds no token besides BOS, EOS and padding")
    return {
        name: CoreResult(
            _in_categories(fidelity[name].metrics() | _neighbor_cosines(sae), spliced[name], clean, zero),
            histogram(fidelity[name].density_F.log10(), -6, 0),
        )
        for name, sae in saes.items()
    }


def run_core(bench: Bench, saes: dict[str, SAE]) -> Iterator[Outcome]:
    """The core evaluation on the bench's text, all SAEs in one pass."""
    failed: dict[str, Exception] = {}
    with progress_bar(bench.console) as bar:
        task = bar.add_task("core evaluation", total=bench.tokens)
        results = evaluate_core(
            bench.lm, saes, bench.rows(), progress=lambda count: bar.update(task, advance=count), failed=failed
        )
    for name, error in failed.items():
        yield failure(name, "core", error)
    for name, result in results.items():
        seen = result.core["token_stats"]["total_tokens_eval_sparsity_variance"]
        if seen < bench.tokens:
            bench.console.print(f"[yellow]{name}: the text ended after {seen:,} of {bench.tokens:,} tokens[/]")
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
            unstructured={"log10_density": result.density},
        )


def _neighbor_cosines(sae: SAE) -> dict[str, float]:
    """Over all latents, dead ones too, as SAEBench has them."""
    weights = {"encoder": sae.W_enc, "decoder": sae.W_dec}
    return {f"average_max_{k}_cosine_sim": nearest_neighbors(w).cosine.mean().item() for k, w in weights.items()}


def _keep(seen: list[Tensor], real: Tensor) -> Callable[[Tensor], Tensor]:
    """Leave the hook's output as it is, and append its real positions, fp32 `[n, D]`, to `seen`."""

    def look(hidden: Tensor) -> Tensor:
        seen.append(hidden[real].float())
        return hidden

    return look


def _splice(x_hat_nD: Tensor, real: Tensor) -> Callable[[Tensor], Tensor]:
    def replace(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[real] = x_hat_nD.to(hidden.dtype)
        return hidden

    return replace


def _in_categories(figures: dict[str, float], sae: Behaviour, clean: Behaviour, zero: Behaviour) -> Metrics:
    """SAEBench's categories and keys; a score is 1 for the clean model and 0 for zero ablation."""
    n = clean.tokens
    ce, ce_clean, ce_zero = sae.ce / n, clean.ce / n, zero.ce / n
    kl, kl_zero = sae.kl / sae.positions, zero.kl / zero.positions
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
            "total_tokens_eval_reconstruction": clean.tokens,
            "total_tokens_eval_sparsity_variance": int(figures["tokens"]),
        },
    }
