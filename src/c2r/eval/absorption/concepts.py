"""Absorption and splitting of labelled concepts in an SAE: SAEBench 0.6.0's first-letter metric, on arrays.

A concept is absorbed on a sample if a linear probe finds it there, but the concept's own latents do not fire and more
specific latents represent it (Chanin et al. 2024, arXiv 2409.14507; Karvonen et al. 2025, arXiv 2503.09532).

B labelled samples · D width of the activations · F latents · C classes · K largest number of latents in a probe ·
n scored samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.config.evaluations import AbsorptionSettings
from c2r.eval.absorption.probes import LinearProbe, f1_per_class, one_vs_rest_probe
from c2r.eval.absorption.scoring import score_samples
from c2r.eval.absorption.sparse_probes import k_sparse_f1, l1_probe
from c2r.kernels.codes import Codes, from_dense, join, take, to_dense
from c2r.sae.model import SAE


class Labelled(NamedTuple):
    """Activations of samples with one class each, split into a training and a test part."""

    x_train_BD: Tensor
    y_train_B: Tensor
    """Index of each sample's class, from 0."""
    x_test_BD: Tensor
    y_test_B: Tensor


class EncodedSamples(NamedTuple):
    """An SAE's activations on `Labelled`, and its decoder."""

    train: Codes
    test: Codes
    W_dec_FD: Tensor
    """Rows of unit norm."""


class ClassResult(NamedTuple):
    """The result for one class."""

    name: str
    probe_f1: float
    """F1 of the ground-truth probe on the test part."""
    f1_by_k: list[float]
    """F1 of the k-sparse probes for k = 1, 2, …"""
    split_latents: list[int]
    """The class's own latents."""
    scored: int
    """Test samples of the class that the ground-truth probe classifies correctly."""
    fraction: float | None
    """Mean absorption fraction; None if no sample is scored."""
    full: int
    """Number of scored samples that are fully absorbed."""

    @property
    def full_rate(self) -> float | None:
        """Share of scored samples that are fully absorbed; None if no sample is scored."""
        return self.full / self.scored if self.scored else None


class Scored(NamedTuple):
    """All scored samples, sorted by class."""

    index_n: Tensor
    """Index in the test part."""
    class_n: Tensor
    fraction_n: Tensor
    full_n: Tensor


@dataclass(frozen=True)
class Absorption:
    """Absorption and splitting of one SAE on one labelled set."""

    classes: list[ClassResult]
    passing: list[ClassResult]
    """Classes whose ground-truth probe is good enough."""
    means: dict[str, float] | None
    """SAEBench's means and sample standard deviations over the passing classes; None if not evaluable."""
    reason: str | None
    """Why the result is not evaluable; None if it is."""
    scored: Scored


def encoded(sae: SAE, data: Labelled, batch: int = 2048) -> EncodedSamples:
    """The SAE's activations, each multiplied by its decoder row's norm, as if decoder rows had unit norm.

    Raises:
        ValueError: the SAE reads activations of another width.
    """
    if sae.d_in != data.x_train_BD.shape[1]:
        raise ValueError(
            f"sae: it reads activations of width {sae.d_in}, but the samples have width {data.x_train_BD.shape[1]}"
        )
    norms_F = sae.W_dec.norm(dim=1)
    with torch.no_grad():
        train, test = (
            join([from_dense(sae.encode(x.to(norms_F)) * norms_F) for x in part.split(batch)])
            for part in (data.x_train_BD, data.x_test_BD)
        )
        return EncodedSamples(train, test, sae.W_dec / norms_F.clamp(min=1e-12)[:, None])


def absorption(
    data: Labelled,
    sae: SAE | EncodedSamples,
    classes: Sequence[str],
    *,
    settings: AbsorptionSettings = AbsorptionSettings(),  # noqa: B008 (immutable)
    probe: LinearProbe | None = None,
    l1_weight_CF: Tensor | None = None,
    seed: int = 0,
) -> Absorption:
    """Compute absorption and splitting of each class.

    Arguments:
        sae: an SAE, or its activations and decoder.
        classes: names of the classes, in the order of the labels.
        probe: ground-truth probe; None: trained on the training part.
        l1_weight_CF: weights that rank the latents for each class; None: trained on the training part by `l1_probe`.
        seed: seed of the probes' training.

    Raises:
        ValueError: shapes do not match, labels are out of range, a class has no training sample, or there are fewer
            classes than `settings.min_classes`.
    """
    _check(data, classes, settings)
    acts = encoded(sae, data) if isinstance(sae, SAE) else sae
    data = Labelled(*(tensor.to(acts.W_dec_FD.device) for tensor in data))
    probe = probe or one_vs_rest_probe(data.x_train_BD, data.y_train_B, len(classes), seed=seed)
    probe = LinearProbe(*(tensor.to(acts.W_dec_FD.device) for tensor in probe))
    if l1_weight_CF is None:
        l1_weight_CF = l1_probe(acts.train, data.y_train_B, len(classes), batch=settings.l1_batch, seed=seed)
    for name, weight, width in (
        ("probe", probe.weight_CD, data.x_test_BD.shape[1]),
        ("l1_weight_CF", l1_weight_CF, acts.train.width),
    ):
        if weight.shape != (len(classes), width):
            raise ValueError(f"{name}: got weights of shape {list(weight.shape)}; expected {[len(classes), width]}")

    ranked_CK = l1_weight_CF.topk(min(settings.max_k, acts.train.width), dim=1).indices.to(acts.W_dec_FD.device)
    f1_CK = k_sparse_f1(acts.train, data.y_train_B, acts.test, data.y_test_B, ranked_CK).tolist()
    split = [latents[: splits(f1, settings.f1_jump)] for latents, f1 in zip(ranked_CK.tolist(), f1_CK, strict=True)]
    probe_f1 = f1_per_class(probe, data.x_test_BD, data.y_test_B).tolist()
    scored = _score(data, acts, probe, split, settings)
    results = []
    for c, name in enumerate(classes):
        mine = scored.class_n == c
        fraction = scored.fraction_n[mine].mean().item() if mine.any() else None
        full = int(scored.full_n[mine].sum())
        results.append(ClassResult(name, probe_f1[c], f1_CK[c], split[c], int(mine.sum()), fraction, full))
    passing = [result for result in results if result.probe_f1 > settings.min_probe_f1 and result.scored]
    if len(passing) < settings.min_classes:
        reason = (
            f"only {len(passing)} of {len(classes)} classes have a ground-truth probe with F1 > "
            f"{settings.min_probe_f1:g}; {settings.min_classes} are needed"
        )
        return Absorption(results, passing, None, reason, scored)
    return Absorption(results, passing, _means(passing), None, scored)


def splits(f1_K: Sequence[float], jump: float) -> int:
    """Number of latents that a class is split over: the first k that each add more than `jump` to F1; at least 1."""
    best, count = -100.0, 0
    for f1 in f1_K:
        if f1 <= best + jump:
            break
        best, count = f1, count + 1
    return count


def _score(
    data: Labelled, acts: EncodedSamples, probe: LinearProbe, split: list[list[int]], settings: AbsorptionSettings
) -> Scored:
    found_B = probe.logits(data.x_test_BD).gather(1, data.y_test_B[:, None])[:, 0] > 0
    index_n = found_B.nonzero()[:, 0]
    index_n = index_n[data.y_test_B[index_n].argsort(stable=True)]
    class_n = data.y_test_B[index_n]
    unit_CD = F.normalize(probe.weight_CD, dim=1)
    cosine_CF = unit_CD @ F.normalize(acts.W_dec_FD, dim=1).T
    main_CF = torch.zeros_like(cosine_CF, dtype=torch.bool)
    for c, latents in enumerate(split):
        main_CF[c, latents] = True
    parts = [
        score_samples(
            data.x_test_BD[index], to_dense(take(acts.test, index)), unit_CD[c], cosine_CF[c], main_CF[c], settings
        )
        for index, c in zip(*(t.split(max(1, 2**24 // acts.test.width)) for t in (index_n, class_n)), strict=True)
    ]
    return Scored(index_n, class_n, *(torch.cat(values) for values in zip(*parts, strict=True)))


def _means(passing: list[ClassResult]) -> dict[str, float]:
    """Means and sample standard deviations over classes, under SAEBench's names."""
    values = {
        "absorption_fraction_score": [result.fraction or 0.0 for result in passing],
        "full_absorption_score": [result.full_rate or 0.0 for result in passing],
        "num_split_features": [float(len(result.split_latents)) for result in passing],
    }
    spread = {name: statistics.stdev(v) if len(v) > 1 else float("nan") for name, v in values.items()}
    means = {f"mean_{name}": statistics.fmean(v) for name, v in values.items()}
    return means | {f"std_dev_{name}": value for name, value in spread.items()}


def _check(data: Labelled, classes: Sequence[str], settings: AbsorptionSettings) -> None:
    if settings.min_classes > len(classes):
        raise ValueError(f"min_classes: got {settings.min_classes}, but there are {len(classes)} classes")
    for part, x_BD, y_B in (("train", data.x_train_BD, data.y_train_B), ("test", data.x_test_BD, data.y_test_B)):
        if len(x_BD) != len(y_B) or len(y_B) == 0:
            raise ValueError(f"{part}: got {len(x_BD)} samples and {len(y_B)} labels; expected one label per sample")
        if int(y_B.min()) < 0 or int(y_B.max()) >= len(classes):
            raise ValueError(f"{part}: got labels from {int(y_B.min())} to {int(y_B.max())}, but there are "
                             f"{len(classes)} classes")  # fmt: skip
    counts = torch.bincount(data.y_train_B, minlength=len(classes)).tolist()
    missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if missing:
        raise ValueError(f"train: no sample of {', '.join(missing)}; every class needs at least one")
