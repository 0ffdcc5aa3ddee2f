"""The ground-truth probe of first-letter absorption, defined as in SAEBench.

B samples · D width of the activations · C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LinearProbe(NamedTuple):
    """One-vs-rest linear probes, one per class."""

    weight_CD: Tensor
    bias_C: Tensor

    def logits(self, x_BD: Tensor) -> Tensor:
        """Logits `[B, C]`; a sample is classified as positive if its logit is above 0."""
        return x_BD @ self.weight_CD.T + self.bias_C


def one_vs_rest_probe(
    x_BD: Tensor, labels_B: Tensor, classes: int, *, epochs: int = 50, batch: int = 64, seed: int = 0
) -> LinearProbe:
    """Train one-vs-rest logistic probes jointly, as SAEBench 0.6.0 trains its ground-truth probes.

    Binary cross-entropy with pos_weight n_negative/n_positive; Adam with weight decay 1e-4 and a learning rate that
    decays exponentially from 1e-2 to 1e-5 over the epochs.

    Raises:
        ValueError: a class has no sample, so its pos_weight is undefined.
    """
    positives_C = torch.bincount(labels_B, minlength=classes).to(x_BD)
    if bool((positives_C == 0).any()):
        missing = (positives_C == 0).nonzero().flatten().tolist()
        raise ValueError(f"labels: classes {missing} have no sample among {len(labels_B)}; every class needs one")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(0.01 * torch.randn(classes, x_BD.shape[1], generator=generator).to(x_BD))
    bias = torch.nn.Parameter(torch.zeros(classes).to(x_BD))
    targets_BC = F.one_hot(labels_B, classes).to(x_BD)
    pos_weight_C = (len(labels_B) - positives_C) / positives_C
    optimizer = torch.optim.Adam([weight, bias], lr=1e-2, weight_decay=1e-4, foreach=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-5 / 1e-2) ** (1 / epochs))
    for _ in range(epochs):
        for rows in torch.randperm(len(labels_B), generator=generator).split(batch):
            optimizer.zero_grad()
            logits = F.linear(x_BD[rows], weight, bias)
            F.binary_cross_entropy_with_logits(logits, targets_BC[rows], pos_weight=pos_weight_C).backward()
            optimizer.step()
        schedule.step()
    return LinearProbe(weight.detach(), bias.detach())


def f1_per_class(probe: LinearProbe, x_BD: Tensor, labels_B: Tensor) -> Tensor:
    """F1 of each class's probe on labelled samples, `[C]`; 0 if neither a prediction nor a label is positive."""
    predicted_BC = probe.logits(x_BD) > 0
    actual_BC = F.one_hot(labels_B, len(probe.bias_C)).bool()
    hits_C = (predicted_BC & actual_BC).sum(0)
    return 2 * hits_C / (predicted_BC.sum(0) + actual_BC.sum(0)).clamp(min=1)
