"""One SAE in training: its weights, objective, optimiser and counters, and the step.

B tokens in a batch · D width of the activations · F latents · N non-zeros in a batch.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.config.run import TrainConfig
from c2r.config.saes import MatryoshkaConfig, SAEConfig, TopKConfig, group_ends
from c2r.kernels.codes import Acts, Codes, Support, encode_all, encode_at, fired, l0
from c2r.losses import Encoded, Forward, lp
from c2r.machine import describe_machine
from c2r.methods import RECIPES
from c2r.neighbors import Neighbors, NeighborTable, renewed_rows
from c2r.sae.model import SAE, Extra
from c2r.sae.selection import BatchTopK
from c2r.training.consistency import Consistency
from c2r.training.optim import (
    adam,
    at_unit_norm,
    clip_gradients,
    geometric_median,
    learning_rate_factor,
    normalise_rows,
    project_gradient,
    ramp,
    random_unit_rows,
)
from c2r.training.precision import Precision, choose_precision, restored

SPARSE_BELOW = 0.03
"""Share of activations that fire, below which the sparse step beats the dense one (benchmarks/sparse.py)."""
ALIVE_TOKENS = 500_000
"""A latent counts as alive in what a run shows if it fired within so many tokens."""
_COUNTED = (
    "step_number", "threshold", "smallest", "silent_tokens_F", "ever_fired_F", "p", "p_scale", "share",
)  # fmt: skip
"""Attributes of a `Run` that training changes, besides weights, moments, neighbours and generators."""
Config = TypeVar("Config", bound=SAEConfig)


class Run(Generic[Config]):
    """Trains one SAE on batches that may serve others too.

    Arguments:
        config: the SAE.
        train: what the SAEs of a run share.
        d_in: D.
        seed: of the initialisation, where `config.seed` has none.
        device: where weights live and batches arrive.
        start: weights to begin with instead of random ones, on activations as they will be trained on. Where the method
            holds decoder rows at unit norm, their norms are folded first: see `at_unit_norm`.
    """

    def __init__(
        self,
        config: Config,
        train: TrainConfig,
        d_in: int,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        start: SAE | None = None,
    ) -> None:
        self.config: Any = config
        self.train, self.recipe = train, RECIPES[config.method]
        self.seed = seed if config.seed is None else config.seed
        self.fresh = start is None
        if start is not None and self.recipe.unit_rows:
            start = at_unit_norm(start, self.seed)
        self.sae = (self._random_sae(d_in) if start is None else start).to(device)
        self._hold_thresholds()
        self.threshold = torch.tensor(-1.0, device=device)
        """Of batch-top-k's inference form, learnt while training; −1 until it is first measured."""
        self.smallest = torch.tensor(-1.0, device=device)
        """The last batch's measure of it, which serves an SAE that is saved before."""
        self.optimizer = adam(list(self.sae.parameters()), train.lr)
        self.product_dtype, self.coarse = choose_precision(config, train, self.sae.W_dec.device)
        self.selector = BatchTopK()
        mode = config.c2r.neighbors if config.c2r else "lagged"
        begins = config.c2r.start if config.c2r else 0
        rows = renewed_rows(config.width, max(1, train.steps - begins))
        self.table = NeighborTable(mode, rows=rows, dtype=self.product_dtype, seed=self.seed)
        self.consistency = None if config.c2r is None else Consistency(config, d_in, seed=self.seed)
        self.ends = (
            group_ends(config.fractions, config.width) if isinstance(config, MatryoshkaConfig) else (config.width,)
        )
        self.silent_tokens_F = torch.zeros(config.width, dtype=torch.long, device=device)
        self.ever_fired_F = torch.zeros(config.width, dtype=torch.bool, device=device)
        self.p, self.p_scale = 1.0, 1.0
        self.share = 1.0
        """Of the last step's activations, how many fired."""
        self.int8_found = False
        """Whether int8 found the last step's candidates."""
        self.step_number = 0
        self.machines: list[dict[str, Any]] = []
        """What each part of the training ran on and in what precision, with its first step."""
        self._note_machine()
        self._neighbors: tuple[int, Neighbors] | None = None

    def _random_sae(self, d_in: int) -> SAE:
        rows_FD = random_unit_rows(self.config.width, d_in, self.seed) * self.recipe.initial_norm
        zeros_F = torch.zeros(self.config.width)
        extra = {
            "standard": Extra(),
            "jumprelu": Extra(threshold=zeros_F + getattr(self.config, "threshold_init", 0.0)),
            "gated": Extra(r_mag=zeros_F.clone(), b_mag=zeros_F.clone()),
        }[self.recipe.trained_as]
        return SAE(
            rows_FD.clone(), zeros_F, rows_FD, torch.zeros(d_in), architecture=self.recipe.trained_as, extra=extra,
            subtract_b_dec=self.recipe.subtract_b_dec,
        )  # fmt: skip

    def step(self, x_BD: Tensor) -> dict[str, Tensor]:
        """One update on `x_BD`, activations of mean square norm 1. Returns what was measured before it."""
        if self.step_number == 0 and self.fresh and self.recipe.median_start:
            self.sae.b_dec.data.copy_(geometric_median(x_BD))
        for group in self.optimizer.param_groups:
            group["lr"] = self.train.lr * learning_rate_factor(self.step_number, self.train)

        # ------------------------------------------------------------------------------------------------------
        sae = self.sae
        encoded = self.recipe.encode(self, x_BD)
        self.observe(encoded.acts, len(x_BD))
        forward = Forward(sae, x_BD, encoded, self.dead_F, self.ends)
        losses = {name: term(self, forward) for name, term in self.recipe.terms.items()}
        losses["c2r"] = self.consistency_term(encoded, len(x_BD))
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        if self.recipe.unit_rows:
            project_gradient(sae.W_dec)
        if self.config.clip is not None:
            clip_gradients(list(sae.parameters()), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recipe.unit_rows:
            normalise_rows(sae.W_dec)
        self._hold_thresholds()
        # ------------------------------------------------------------------------------------------------------

        self.step_number += 1
        with torch.no_grad():
            error, spread = (y.square().sum(1).mean() for y in (forward.error_BD, x_BD - x_BD.mean(0)))
            return {name: value.detach() for name, value in losses.items()} | {
                "loss": loss.detach(),
                "ev": 1 - error / spread,
                "l0": l0(encoded.acts),
                "alive": self.alive_F.float().mean(),
                "penalty_ratio": losses["c2r"].detach() / error,
                "neighbor_churn": self.table.churn,
                "neighbor_regret": self.table.regret,
                "product_bits": torch.tensor(8.0 * self.product_dtype.itemsize),
                "int8": torch.tensor(float(self.int8_found)),
            }

    @torch.no_grad()
    def _hold_thresholds(self) -> None:
        """Keep JumpReLU's thresholds at 0 or above: below, training would emit negative activations, inference none."""
        if self.sae.threshold is not None:
            self.sae.threshold.clamp_(min=0)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit: a tree of JSON values and of tensors, which are the run's own."""
        adam = {name: dict(self.optimizer.state[weight]) for name, weight in self.sae.named_parameters()}
        return {
            "weights": {name: weight.detach() for name, weight in self.sae.named_parameters()},
            "adam": adam,
            "table": self.table.state_dict(),
            "consistency": None if self.consistency is None else self.consistency.generator.get_state(),
            "selector": dict(vars(self.selector)),  # numbers alone
            "product": str(self.product_dtype).removeprefix("torch."),
            "coarse": self.coarse,
            "machines": self.machines,
            **{name: getattr(self, name) for name in _COUNTED},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`, copied to where the run's own is."""
        for name, weight in self.sae.named_parameters():
            weight.copy_(state["weights"][name])
            for key, moment in self.optimizer.state[weight].items():
                moment.copy_(state["adam"][name][key])
        device = self.sae.W_dec.device
        table = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in state["table"].items()}
        self.table.load_state_dict(table | {"generator": state["table"]["generator"]})
        if self.consistency is not None:
            self.consistency.generator.set_state(state["consistency"])
        vars(self.selector).update(state["selector"])
        # What "auto" chose when the run began, which it might not on another machine.
        self.product_dtype, self.coarse = restored(state, device)
        self.table.dtype = self.product_dtype
        for name in _COUNTED:
            value = state[name]
            setattr(self, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)
        self.machines = [dict(machine) for machine in state.get("machines", [])]
        self._note_machine()

    @property
    def precision(self) -> Precision:
        """What it trains in."""
        return Precision(self.product_dtype, self.coarse)

    def _note_machine(self) -> None:
        """Record the machine and the precision from here on, unless they are those of the last part."""
        here = {**describe_machine(self.sae.W_dec.device), **self.precision.record}
        last = (
            {name: value for name, value in self.machines[-1].items() if name != "from_step"} if self.machines else {}
        )
        if here != last:
            self.machines.append({"from_step": self.step_number, **here})

    def consistency_term(self, encoded: Encoded, batch: int) -> Tensor:
        """λ·C²R of the activations that the method shows it; 0 in the steps that leave it out."""
        if self.consistency is None or self.step_number < self.consistency.config.start:
            return self.sae.W_dec.new_zeros(())
        if not self.consistency.applies(self.step_number):
            if self.table.mode == "lagged":
                self.neighbors()  # the table ages with the decoder, whether a step has the term or not
            return self.sae.W_dec.new_zeros(())
        return self.consistency.term(encoded.penalised, self.sae.W_dec, self.neighbors(), batch, self.step_number)

    def neighbors(self) -> Neighbors:
        """Nearest neighbours, searched at most once per step.

        Raises:
            ValueError: a search of the whole decoder finds rows that are not finite; names the SAE, the step and a row.
        """
        if self._neighbors is None or self._neighbors[0] != self.step_number:
            try:
                self._neighbors = (self.step_number, self.table.refresh(self.sae.W_dec))
            except ValueError as error:
                raise ValueError(f"saes.{self.config.name}: at step {self.step_number}, {error}") from error
        return self._neighbors[1]

    def product(self, x_BD: Tensor) -> Tensor:
        """Pre-activations `[B, F]`: their product in the configured precision, its gradient in fp32."""
        sae = self.sae
        return encode_all(x_BD, sae.W_enc, sae.b_enc, sae.b_dec if sae.subtract_b_dec else None, self.product_dtype)

    @torch.no_grad()
    def selecting_product(self, x_BD: Tensor) -> Tensor:
        """(x − b_dec)·W_enc `[B, F]` in the configured precision, to choose by; the transpose of a contiguous one.

        Without the bias: added by the product, on a CPU it costs a tenth of it.
        """
        sae, low = self.sae, self.product_dtype
        return F.linear(sae.W_enc.to(low), sae.centred(x_BD).to(low)).T

    @torch.no_grad()
    def product_by_token(self, x_BD: Tensor) -> Tensor:
        """Pre-activations `[B, F]` in the configured precision, to choose each token's by."""
        sae, low = self.sae, self.product_dtype
        return F.linear(sae.centred(x_BD).to(low), sae.W_enc.to(low), sae.b_enc.to(low))

    def encode_at(self, x_BD: Tensor, support: Support, values_N: Tensor | None = None) -> Tensor:
        """Pre-activations `[N]` at the chosen places, in fp32 with their gradient; `values_N` if they are known."""
        sae = self.sae
        return encode_at(support, x_BD, sae.W_enc, sae.b_enc, sae.b_dec if sae.subtract_b_dec else None, values_N)

    @torch.no_grad()
    def observe(self, acts: Acts, batch: int) -> None:
        """Count the tokens since each latent fired, and follow the smallest activation that the top-k family kept.

        For batch-top-k it is the batch's smallest, for the others the mean over tokens of each token's smallest.
        """
        self.silent_tokens_F += batch
        self.share = l0(acts).item() / self.config.width
        fired_F = fired(acts)
        self.silent_tokens_F[fired_F] = 0
        self.ever_fired_F |= fired_F
        if isinstance(self.config, TopKConfig) and isinstance(acts, Codes):
            self.smallest = _smallest(acts, of_each_token=self.recipe.architecture != "jumprelu")
            if self.step_number > self.threshold_start:
                moved = self.threshold.lerp(self.smallest, 1 - self.threshold_decay)
                self.threshold = torch.where(self.threshold < 0, self.smallest, moved)

    @property
    def sparse_pays(self) -> bool:
        """Whether a method without a fixed K is better off on the sparse path: few fired in the last step."""
        return self.share < SPARSE_BELOW

    @property
    def dead_F(self) -> Tensor:
        """Latents silent for `dead_after_tokens`, bool `[F]`."""
        return self.silent_tokens_F >= self.config.dead_after_tokens

    @property
    def alive_F(self) -> Tensor:
        """Latents that fired within `ALIVE_TOKENS` (or `dead_after_tokens` if that is less), bool `[F]`."""
        return self.ever_fired_F & (self.silent_tokens_F < min(ALIVE_TOKENS, self.config.dead_after_tokens))

    @property
    def k(self) -> int:
        """k of this step: linearly from D (or F) to its value over the first `k_anneal` of the steps."""
        steps = round(self.config.k_anneal * self.train.steps)
        if self.step_number >= steps:
            return self.config.k
        begin = min(self.sae.d_in, self.sae.width)
        return int(begin + (self.config.k - begin) * self.step_number / steps)

    @property
    def sparsity_scale(self) -> float:
        """Warm-up of the sparsity term, from 0 to 1."""
        given = self.config.sparsity_warmup_steps
        return ramp(self.step_number, min(2000, self.train.steps // 10) if given is None else given)

    @torch.no_grad()
    def annealed_p(self, acts: Acts) -> tuple[float, float]:
        """p of this step, and the factor that keeps the term from jumping where p does (arXiv 2408.00113)."""
        at = self.step_number / self.train.steps
        done = (at - self.config.anneal_from) / (self.config.anneal_to - self.config.anneal_from)
        stage = min(max(int(done * 10) + 1, 0), 10) if done >= 0 else 0
        p = 1 - (1 - self.config.p_end) * stage / 10
        if p != self.p:
            before, after = lp(acts, self.p), lp(acts, p)
            self.p_scale *= (before / after).item() if after > 0 else 1.0
            self.p = p
        return self.p, self.p_scale

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

        An SAE saved before its threshold is tracked has that of the last batch.

        Raises:
            ValueError: no step was made, or weights are not finite.
        """
        sae, extra = self.sae, self.sae.extra
        broken = [name for name, weight in sae.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise ValueError(f"saes.{self.config.name}: {', '.join(broken)} hold NaN or infinity; not saved")
        if self.recipe.architecture in ("topk", "abs_topk"):
            extra = Extra(k=self.config.k)
        elif self.recipe.architecture == "jumprelu" and extra.threshold is None:
            threshold = torch.where(self.threshold < 0, self.smallest, self.threshold)
            if threshold < 0:
                raise ValueError(f"saes.{self.config.name}: no step was made, so there is no inference threshold")
            extra = Extra(threshold=threshold.expand(sae.width))
        return rescaled(sae, scale, self.recipe.architecture, extra)


def rescaled(sae: SAE, scale: float, architecture: Any, extra: Extra) -> SAE:
    """A copy that does on scale·x what `sae` does on x: biases and thresholds grow, weights stay."""

    def grown(tensor: Tensor | None, by: float) -> Tensor | None:
        return None if tensor is None else (tensor * by).detach().clone()

    extra = extra._replace(
        threshold=grown(extra.threshold, scale), r_mag=grown(extra.r_mag, 1.0), b_mag=grown(extra.b_mag, scale),
        rank=grown(extra.rank, 1.0),
    )  # fmt: skip
    rows = [sae.W_enc, sae.b_enc * scale, sae.W_dec, sae.b_dec * scale]
    return SAE(
        *(row.detach().clone() for row in rows), architecture=architecture, extra=extra,
        subtract_b_dec=sae.subtract_b_dec,
    )  # fmt: skip


def _smallest(acts: Codes, *, of_each_token: bool) -> Tensor:
    """The smallest positive activation of the batch, or the mean over tokens of each one's; 0 without any."""
    kept_N = acts.values_N > 0
    if not kept_N.any():
        return acts.values_N.new_zeros(())
    if not of_each_token:
        return acts.values_N[kept_N].min()
    least_B = acts.values_N.new_full((acts.support.batch,), torch.inf)
    least_B.scatter_reduce_(0, acts.support.tokens_N[kept_N], acts.values_N[kept_N], "amin")
    return least_B[least_B.isfinite()].mean()
