"""Training of one SAE: its weights, objective, optimiser and counters, and the optimisation step.

B tokens in a batch · D width of the activations · F latents.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from c2r.config.run import TrainConfig
from c2r.config.saes import SAEConfig
from c2r.kernels.codes import l0
from c2r.losses import Forward
from c2r.machine import describe_machine
from c2r.methods import METHODS
from c2r.neighbors import Neighbors, NeighborTable, renewed_rows
from c2r.sae.encoder import Encoder
from c2r.sae.model import SAE, Extra, rescaled
from c2r.schedules import learning_rate_factor
from c2r.step import Method, Step
from c2r.training.activity import Activity
from c2r.training.consistency import Consistency
from c2r.training.optim import (
    adam,
    at_unit_norm,
    clip_gradients,
    geometric_median,
    normalise_rows,
    project_gradient,
    random_unit_rows,
)
from c2r.training.precision import Precision, choose_precision, restored

Config = TypeVar("Config", bound=SAEConfig)


class Run(Generic[Config]):
    """Trains one SAE. Several can train on the same batches.

    Arguments:
        config: configuration of the SAE.
        train: training settings shared by all SAEs of the run.
        d_in: width D of the activations.
        seed: seed of the initialisation if `config.seed` is unset.
        device: device of the weights and the batches.
        start: an SAE to start from instead of random weights, for activations at the scale used in training. If the
            method keeps decoder rows at unit norm, they are normalised first (see `at_unit_norm`).
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
        self.config, self.train = config, train
        self.method: Method[Any] = METHODS[config.method]
        self.seed = seed if config.seed is None else config.seed
        self.fresh = start is None
        if start is not None and self.method.unit_rows:
            start = at_unit_norm(start, self.seed)
        self.sae = (self._random_sae(d_in) if start is None else start).to(device)
        self._hold_thresholds()
        device = self.sae.W_dec.device
        self.optimizer = adam(list(self.sae.parameters()), train.lr)
        precision = choose_precision(config, train, device)
        self.encoder = Encoder(self.sae, precision.product, int8=precision.int8)
        self.memory = None if self.method.memory is None else _on(device, self.method.memory())
        self.activity = Activity(config.width, config.dead_after_tokens, device)
        mode = config.c2r.neighbors if config.c2r else "lagged"
        begins = config.c2r.start if config.c2r else 0
        rows = renewed_rows(config.width, max(1, train.steps - begins))
        self.table = NeighborTable(mode, rows=rows, dtype=precision.product, seed=self.seed)
        self.consistency = None if config.c2r is None else Consistency(config, d_in, seed=self.seed)
        self.step_number = 0
        self.machines: list[dict[str, Any]] = []
        """Machine and precision of each part of the training, with the first step of the part."""
        self._note_machine()
        self._neighbors: tuple[int, Neighbors] | None = None

    def _random_sae(self, d_in: int) -> SAE:
        rows_FD = random_unit_rows(self.config.width, d_in, self.seed) * self.method.initial_norm
        zeros_F = torch.zeros(self.config.width)
        extra = {
            "standard": Extra(),
            "jumprelu": Extra(threshold=zeros_F + getattr(self.config, "threshold_init", 0.0)),
            "gated": Extra(r_mag=zeros_F.clone(), b_mag=zeros_F.clone()),
        }[self.method.trained_as]
        return SAE(
            rows_FD.clone(), zeros_F, rows_FD, torch.zeros(d_in), architecture=self.method.trained_as, extra=extra,
            subtract_b_dec=self.method.subtract_b_dec,
        )  # fmt: skip

    def step(self, x_BD: Tensor) -> dict[str, Tensor]:
        """Make one optimisation step on `x_BD` (mean squared norm 1); return metrics of the forward pass before it."""
        if self.step_number == 0 and self.fresh and self.method.median_start:
            self.sae.b_dec.data.copy_(geometric_median(x_BD))
        for group in self.optimizer.param_groups:
            group["lr"] = self.train.lr * learning_rate_factor(self.step_number, self.train)

        # ------------------------------------------------------------------------------------------------------
        sae, method, step = self.sae, self.method, self.seen(x_BD)
        encoded = method.encode(step)
        self.activity.observe(encoded.acts, len(x_BD))
        if method.after is not None:
            method.after(step, encoded)
        forward = Forward(sae, x_BD, encoded, self.activity.dead_F)
        losses = {name: term(step, forward) for name, term in method.terms.items()}
        losses["c2r"] = sae.W_dec.new_zeros(()) if self.consistency is None else self.consistency(step, encoded)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        if method.unit_rows:
            project_gradient(sae.W_dec)
        if self.config.clip is not None:
            clip_gradients(list(sae.parameters()), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if method.unit_rows:
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
                "alive": self.activity.alive_F.float().mean(),
                "penalty_ratio": losses["c2r"].detach() / error,
                "neighbor_churn": self.table.churn,
                "neighbor_regret": self.table.regret,
                "product_bits": torch.tensor(8.0 * self.encoder.dtype.itemsize),
                "int8": torch.tensor(float(encoded.found_by_int8)),
            }

    def seen(self, x_BD: Tensor) -> Step[Config]:
        """The next step, as passed to the method's functions."""
        return Step(
            self.step_number, self.train.steps, x_BD, self.encoder, self.config, self.activity.sparse_pays,
            self.neighbors, self.memory,
        )  # fmt: skip

    def neighbors(self) -> Neighbors:
        """Nearest neighbours of all decoder rows, searched at most once per step.

        Raises:
            ValueError: a search of the whole decoder found rows with NaN or infinity; names the SAE, the step and a
                row.
        """
        if self._neighbors is None or self._neighbors[0] != self.step_number:
            try:
                self._neighbors = (self.step_number, self.table.refresh(self.sae.W_dec))
            except ValueError as error:
                raise ValueError(f"saes.{self.config.name}: at step {self.step_number}, {error}") from error
        return self._neighbors[1]

    @torch.no_grad()
    def _hold_thresholds(self) -> None:
        """Clamp JumpReLU's thresholds at 0: below, activations would be negative in training, unlike in inference."""
        if self.sae.threshold is not None:
            self.sae.threshold.clamp_(min=0)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume bit for bit: a tree of JSON values and tensors (not copied)."""
        adam = {name: dict(self.optimizer.state[weight]) for name, weight in self.sae.named_parameters()}
        return {
            "weights": {name: weight.detach() for name, weight in self.sae.named_parameters()},
            "adam": adam,
            "table": self.table.state_dict(),
            "consistency": None if self.consistency is None else self.consistency.generator.get_state(),
            "memory": {} if self.memory is None else dict(vars(self.memory)),
            "activity": self.activity.state_dict(),
            "product": self.precision.record["precision"],
            "int8": self.encoder.int8,
            "machines": self.machines,
            "step_number": self.step_number,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`, copying its tensors to this device."""
        for name, weight in self.sae.named_parameters():
            weight.copy_(state["weights"][name])
            for key, moment in self.optimizer.state[weight].items():
                moment.copy_(state["adam"][name][key])
        device = self.sae.W_dec.device
        table = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in state["table"].items()}
        self.table.load_state_dict(table | {"generator": state["table"]["generator"]})
        if self.consistency is not None:
            self.consistency.generator.set_state(state["consistency"])
        for name, value in state["memory"].items():
            setattr(self.memory, name, value.clone() if isinstance(value, Tensor) else value)
        if self.memory is not None:
            _on(device, self.memory)
        self.activity.load_state_dict(state["activity"])
        # Keep what "auto" chose when the run began; on another machine it might choose differently.
        precision = restored(state, device)
        self.encoder.dtype, self.encoder.int8 = precision
        self.table.dtype = precision.product
        self.step_number = state["step_number"]
        self.machines = [dict(machine) for machine in state["machines"]]
        self._note_machine()

    @property
    def precision(self) -> Precision:
        """The precision in which the SAE trains."""
        return Precision(self.encoder.dtype, self.encoder.int8)

    def _note_machine(self) -> None:
        """Record machine and precision from this step on, unless they equal the last record."""
        here = {**describe_machine(self.sae.W_dec.device), **self.precision.record}
        last = {name: value for name, value in (self.machines or [{}])[-1].items() if name != "from_step"}
        if here != last:
            self.machines.append({"from_step": self.step_number, **here})

    @torch.no_grad()
    def export(self, scale: float = 1.0) -> SAE:
        """The SAE for the model's unscaled activations, which are `scale` times those in training.

        The scale is folded into the weights. If the threshold's moving average has not begun, the last batch's
        threshold is used.

        Raises:
            ValueError: no step has been made, or weights contain NaN or infinity.
        """
        sae, extra = self.sae, self.sae.extra
        broken = [name for name, weight in sae.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            raise ValueError(f"saes.{self.config.name}: {', '.join(broken)} contain NaN or infinity; not saved")
        if self.method.finish is not None:
            try:
                extra = self.method.finish(self.config, self.memory)
            except ValueError as error:
                raise ValueError(f"saes.{self.config.name}: {error}") from error
        return rescaled(sae, scale, self.method.architecture, extra)


def _on(device: torch.device, memory: Any) -> Any:
    """Move the tensors of a method's memory to `device`, in place."""
    for f in fields(memory):
        if isinstance(value := getattr(memory, f.name), Tensor):
            setattr(memory, f.name, value.to(device))
    return memory
