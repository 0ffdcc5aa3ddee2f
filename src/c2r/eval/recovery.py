"""How well an SAE trained on known features recovered them.

"Nearest" means the largest signed cosine between decoder rows and true directions; only the one-to-one matching (MCC)
uses |cos|. SAEs are evaluated in their inference form, on fresh activations of the preset they were trained on.

D width of the activations · F latents · G features · P parents · C children · n tokens · m tokens on which a parent's
latent misses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.config.known_features import SyntheticConfig, of_preset
from c2r.eval.bench import Bench
from c2r.eval.fidelity import Fidelity
from c2r.eval.outcome import Outcome, each
from c2r.eval.stability import matched_cosine
from c2r.known_features.generator import KnownFeatures, Sample
from c2r.known_features.presets import known_features
from c2r.progress import progress_bar
from c2r.sae.model import SAE

ABSORBED_SHARE = 0.4
"""Share of the parent's activation that another latent must supply for the parent to count as absorbed."""
SPLIT_COSINE = 0.7
"""Cosine above which a latent counts as representing its nearest feature."""
_SHOWN = {"absorption": "known_absorption", "f1": "feature_f1"}
"""Keys in the summary that differ from those in the metrics, to tell them apart from figures on language models."""


class Recovery:
    """Counts over tokens for all figures of one SAE on known features."""

    def __init__(self, sae: SAE, features: KnownFeatures) -> None:
        self.sae, self.features = sae, features
        self.device = sae.W_dec.device
        self.cosine_FG = F.normalize(sae.W_dec.detach(), dim=1) @ features.directions_GD.to(self.device).T
        self.feature_F = self.cosine_FG.argmax(1)
        """Each latent's nearest feature."""
        self.parents_P = features.parents.to(self.device)
        self.latent_P = self.cosine_FG[:, self.parents_P].argmax(0)
        """Each parent's nearest latent."""
        # Numbers of tokens on which a latent fires, its nearest feature is on, and both.
        self.fires_F, self.on_F, self.both_F = (self._zeros(sae.width) for _ in range(3))
        # Without (row 0) and with (row 1) a child on: tokens on which a parent is on, and its latent fires as well.
        self.on_2P, self.detected_2P = (self._zeros(2, len(self.parents_P)) for _ in range(2))
        self.absorbed_P = self._zeros(len(self.parents_P))
        self.fidelity = Fidelity(sae.width, sae.d_in)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    @torch.no_grad()
    def add(self, sample: Sample) -> None:
        """Count one batch of tokens."""
        x_nD, z_nG = sample.x_BD.to(self.device), sample.z_BG.to(self.device)
        acts_nF = self.sae.encode(x_nD)
        self.fidelity.add(x_nD, self.sae.decode(acts_nF), acts_nF)
        fires_nF, on_nG = acts_nF != 0, z_nG > 0
        on_nF = on_nG[:, self.feature_F]
        self.fires_F += fires_nF.sum(0)
        self.on_F += on_nF.sum(0)
        self.both_F += (fires_nF & on_nF).sum(0)

        on_nP, fires_nP = on_nG[:, self.parents_P], fires_nF[:, self.latent_P]
        child_nP = self._with_child(on_nG)
        for row, where_nP in enumerate((on_nP & ~child_nP, on_nP & child_nP)):
            self.on_2P[row] += where_nP.sum(0)
            self.detected_2P[row] += (where_nP & fires_nP).sum(0)
        missed_nP = on_nP & child_nP & ~fires_nP
        for at, parent in enumerate(self.parents_P.tolist()):
            missed_n = missed_nP[:, at]
            supplied_mF = acts_nF[missed_n] * self.cosine_FG[:, parent]
            enough_m1 = ABSORBED_SHARE * z_nG[missed_n, parent, None]
            self.absorbed_P[at] += (supplied_mF >= enough_m1).any(1).sum()

    def _with_child(self, on_nG: Tensor) -> Tensor:
        """Bool `[n, P]`: whether any child of each parent is on."""
        parent_G = self.features.parent_G.to(self.device)
        born_C = (parent_G >= 0).nonzero().squeeze(1)
        counts_nG = torch.zeros_like(on_nG, dtype=torch.int).index_add_(1, parent_G[born_C], on_nG[:, born_C].int())
        return counts_nG[:, self.parents_P] > 0

    @property
    def f1_F(self) -> Tensor:
        """F1 score of each latent as a detector of its nearest feature; 0 for dead latents."""
        return 2 * self.both_F / (self.fires_F + self.on_F).clamp(min=1)

    @property
    def absorption_P(self) -> Tensor:
        """Among tokens with a parent and one of its children on, the share on which the parent's latent is silent and
        another latent supplies at least `ABSORBED_SHARE` of the parent's activation. NaN if there is no such token.
        """
        return self.absorbed_P / self.on_2P[1]

    @property
    def hole_P(self) -> Tensor:
        """A parent's recall by its latent on tokens without a child on, minus that on tokens with one; NaN if either
        kind of token never occurs.
        """
        alone_P, joint_P = self.detected_2P / self.on_2P
        return alone_P - joint_P

    @property
    def latents_G(self) -> Tensor:
        """Number of latents that represent each feature: latents that fire, whose nearest feature it is, with a cosine
        above `SPLIT_COSINE`.
        """
        standing_F = (self.fires_F > 0) & (self.cosine_FG.amax(1) > SPLIT_COSINE)
        return torch.bincount(self.feature_F[standing_F], minlength=self.features.features)

    def metrics(self) -> dict[str, float]:
        """Means over latents, features or parents; NaN if there are none."""
        return {
            "mcc": matched_cosine(self.sae.W_dec, self.features.directions_GD),
            "uniqueness": len(self.feature_F.unique()) / self.sae.width,
            "f1": self.f1_F.mean().item(),
            "absorption": self.absorption_P.nanmean().item(),
            "hole": self.hole_P.nanmean().item(),
            "latents_per_feature": self.latents_G.float().mean().item(),
            "latents_per_parent": self.latents_G[self.parents_P].float().mean().item(),
        }

    def details(self) -> list[dict[str, Any]]:
        """One row of figures per parent."""
        columns = {
            "feature": self.parents_P,
            "latent": self.latent_P,
            "cosine": self.cosine_FG[self.latent_P, self.parents_P],
            "absorption": self.absorption_P,
            "hole": self.hole_P,
            "latents": self.latents_G[self.parents_P],
        }
        return [
            dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)
        ]


def preset_of(config: dict[str, Any]) -> SyntheticConfig:
    """The preset of known features that an SAE was trained on, from its `cfg.json`.

    Raises:
        ValueError: it was trained on other data.
    """
    data = config.get("c2r", {}).get("data", {})
    if data.get("source") != "synthetic":
        raise ValueError(
            "recovery needs an SAE trained on known features (by c2r, with data.source: synthetic); this one was "
            f"trained on {data.get('path') or data.get('source') or 'data that its cfg.json does not name'}"
        )
    return of_preset(data)


def evaluate_recovery(bench: Bench, name: str, sae: SAE) -> Outcome:
    """Evaluate the recovery of the features that the SAE was trained on, and its reconstruction and sparsity."""
    config = preset_of(sae.config)
    features = known_features(config)
    found = Recovery(sae, features)
    with progress_bar(bench.console) as bar:
        task = bar.add_task(f"recovery {name}", total=bench.config.tokens)
        for sample in features.held_out(bench.config.tokens, bench.config.seed):
            found.add(sample)
            bar.advance(task, len(sample.x_BD))
    recovery, fidelity = found.metrics(), found.fidelity.metrics()
    beside = {
        "ev": fidelity["explained_variance"],
        "l0": fidelity["l0"],
        "true_l0": features.mean_l0,
        "alive": fidelity["frac_alive"],
        # A ratio of means, because tokens without any feature have norm 0 and no ratio of their own.
        "l2_ratio": fidelity["l2_norm_out"] / fidelity["l2_norm_in"],
    }
    return Outcome(
        name,
        "recovery",
        {"recovery": recovery, "fidelity": beside},
        {**beside, **{_SHOWN.get(key, key): value for key, value in recovery.items()}},
        config={"data": config.model_dump(mode="json")},
        details=found.details(),
    )


run_recovery = each("recovery", evaluate_recovery)
