"""One SAE in training: its weights, objective, optimiser and counters, and the step.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from c2r.codes import Acts, Codes, decode, fired, l0, norms
from c2r.config import SAEConfig, TrainConfig
from c2r.loss.terms import Forward
from c2r.neighbors import NeighborTable
from c2r.penalty import lambda_of_strength, penalty_from_norms
from c2r.recipes import RECIPES
from c2r.sae.base import SAE
from c2r.sae.topk import BatchTopK
from c2r.train.optim import (
    geometric_median,
    learning_rate_factor,
    normalise_rows,
    project_gradient,
    random_unit_rows,
)

ALIVE_TOKENS = 500_000
"""A latent counts as alive in what a run shows if it fired within so many tokens."""


class Run:
    """Trains one SAE on batches that may serve others too.

    Arguments:
        config: the SAE.
        train: what the SAEs of a run share.
        d_in: D.
        seed: of the initialisation, where `config.seed` has none.
        device: where weights live and batches arrive.
    """

    def __init__(
        self, config: SAEConfig, train: TrainConfig, d_in: int, *, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        self.config, self.train, self.recipe = config, train, RECIPES[config.method]
        self.seed = seed if config.seed is None else config.seed
        rows_FD = random_unit_rows(config.width, d_in, self.seed).to(device)
        zeros_F = torch.zeros(config.width, device=device)
        # The weights; W_enc = W_dec at the start. `export` gives the inference form, which has a threshold.
        self.sae = SAE(rows_FD.clone(), zeros_F, rows_FD, torch.zeros(d_in, device=device), architecture="standard")
        self.threshold = torch.tensor(-1.0, device=device)
        """Learnt inference threshold; −1 until it is first measured."""
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=train.lr, betas=(0.9, 0.999), fused=True)
        self.product_dtype = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
        self.selector = BatchTopK()
        self.table = NeighborTable(config.c2r.neighbors if config.c2r else "lagged", seed=self.seed)
        self.silent_tokens_F = torch.zeros(config.width, dtype=torch.long, device=device)
        self.step_number = 0

    def step(self, x_BD: Tensor) -> dict[str, Tensor]:
        """One update on `x_BD`, activations of mean square norm 1. Returns what was measured before it."""
        if self.step_number == 0:
            self.sae.b_dec.data.copy_(geometric_median(x_BD))
        for group in self.optimizer.param_groups:
            group["lr"] = self.train.lr * learning_rate_factor(self.step_number, self.train)

        # ------------------------------------------------------------------------------------------------------
        sae = self.sae
        acts = self.recipe.encode(self, x_BD)
        self.observe(acts, len(x_BD))
        x_hat_BD = decode(acts, sae.W_dec, sae.b_dec)
        forward = Forward(x_BD, acts, x_hat_BD, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, self.dead_F)
        losses = {name: term(self, forward) for name, term in self.recipe.terms.items()}
        losses["c2r"] = self.consistency(acts, len(x_BD))
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        project_gradient(sae.W_dec)
        norm = nn.utils.clip_grad_norm_(sae.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        normalise_rows(sae.W_dec)
        # ------------------------------------------------------------------------------------------------------

        self.step_number += 1
        with torch.no_grad():
            spread = (x_BD - x_BD.mean(0)).square().sum(1).mean()
            measured = {name: value.detach() for name, value in losses.items()}
            return measured | {
                "loss": loss.detach(),
                "ev": 1 - measured["reconstruction"] / spread,
                "l0": l0(acts),
                "alive": (self.silent_tokens_F < min(ALIVE_TOKENS, self.config.dead_after_tokens)).float().mean(),
                "penalty_ratio": measured["c2r"] / measured["reconstruction"],
                "gradient_norm": norm,
                "threshold": self.threshold,
            }

    def consistency(self, acts: Acts, batch: int) -> Tensor:
        """λ·C²R, applied in every `every`-th step from `start` on and multiplied by `every`, as published."""
        c2r = self.config.c2r
        if c2r is None or self.step_number < c2r.start or (self.step_number - c2r.start) % c2r.every:
            return torch.zeros((), device=self.sae.W_dec.device)
        lam = c2r.lam
        if lam is None:
            lam = lambda_of_strength(c2r.strength or 0.0, batch=batch, width=self.sae.width, alpha=c2r.alpha)
        neighbors_F = self.table.refresh(self.sae.W_dec)
        penalty = penalty_from_norms(norms(acts), self.sae.W_dec, neighbors_F, alpha=c2r.alpha, margin=c2r.margin)
        return lam * c2r.every * penalty

    @torch.no_grad()
    def observe(self, acts: Acts, batch: int) -> None:
        """Count the tokens since each latent fired, and follow the smallest activation that batch-top-k kept."""
        self.silent_tokens_F += batch
        self.silent_tokens_F[fired(acts)] = 0
        if self.step_number > self.threshold_start:
            values = acts.values_N if isinstance(acts, Codes) else acts
            positive = values[values > 0]
            smallest = positive.min() if len(positive) else values.new_zeros(())
            moved = self.threshold.lerp(smallest, 1 - self.threshold_decay)
            self.threshold = torch.where(self.threshold < 0, smallest, moved)

    @property
    def dead_F(self) -> Tensor:
        """Latents silent for `dead_after_tokens`, bool `[F]`."""
        return self.silent_tokens_F >= self.config.dead_after_tokens

    @property
    def k(self) -> int:
        """k of this step: linearly from D (or F) to its value over the first `k_anneal` of the steps."""
        steps = int(self.config.k_anneal * self.train.steps)
        if self.step_number >= steps:
            return self.config.k
        begin = min(self.sae.d_in, self.sae.width)
        return int(begin + (self.config.k - begin) * self.step_number / steps)

    @property
    def threshold_start(self) -> int:
        """Last step that leaves the threshold alone."""
        given = self.config.threshold_start
        return min(1000, self.train.steps // 2 - 1) if given is None else given

    @property
    def threshold_decay(self) -> float:
        """Of the threshold's moving average; in a short run it spans a tenth of the tracked steps."""
        if self.config.threshold_decay is not None:
            return self.config.threshold_decay
        return min(0.999, 1 - 1 / max(1.0, (self.train.steps - self.threshold_start) / 10))

    @torch.no_grad()
    def export(self, scale: float = 1.0) -> SAE:
        """The SAE for activations as the model gives them, `scale` times those it was trained on (folded in).

        Raises:
            ValueError: the run is too short to have learnt a threshold.
        """
        sae = self.sae
        if self.threshold < 0:
            raise ValueError(
                f"saes.{self.config.name}: after {self.step_number} steps no inference threshold has been learnt yet "
                f"(it is tracked from step {self.threshold_start + 1} on)"
            )
        rows = [sae.W_enc, sae.b_enc * scale, sae.W_dec, sae.b_dec * scale]
        threshold_F = (self.threshold * scale).expand(sae.width).clone()
        return SAE(*(row.clone() for row in rows), architecture="jumprelu", threshold=threshold_F)
