"""k-sparse probes: which latents distinguish a class from the rest, and how well the best k of them classify it.

B labelled samples · C classes · F latents · N non-zeros · K largest number of latents in a probe · U latents used by
any probe · A samples after merging those that are all zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from c2r.kernels.codes import Codes, decode, take


def l1_probe(
    acts: Codes,
    labels_B: Tensor,
    classes: int,
    *,
    l1: float = 0.01,
    epochs: int = 50,
    batch: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Weights `[C, F]` of one-vs-rest probes on activations with an L1 penalty, by which SAEBench 0.6.0 ranks latents.

    The loss is binary cross-entropy with pos_weight n_negative/n_positive, plus `l1`·(mean over classes of Σ|w|); the
    optimiser is Adam with L2 1e-6 and a learning rate that decays exponentially from 1e-2 to 1e-5 over the epochs.
    There are three differences from SAEBench. Weights start at 0 instead of random values, so that results do not
    depend on the order of latents and latents that never fire keep weight 0. Batches are drawn once, and only their
    order changes between epochs. And `batch` is 4096 only if that gives at least 16 batches: with few samples, 50
    epochs of a single batch leave the ranking to chance (docs/reference/metrics.md shows the effect).

    Arguments:
        batch: samples per batch; None: 4096, or a sixteenth of the samples if that is less.

    Raises:
        ValueError: a class has no sample, so its pos_weight is undefined.
    """
    positives_C = torch.bincount(labels_B, minlength=classes).to(acts.values_N)
    if bool((positives_C == 0).any()):
        missing = (positives_C == 0).nonzero().flatten().tolist()
        raise ValueError(f"labels: classes {missing} have no sample among {len(labels_B)}; every class needs one")
    from threadpoolctl import threadpool_limits

    batch = batch or max(1, min(4096, len(labels_B) // 16))
    generator = torch.Generator().manual_seed(seed)
    weight_FC = torch.nn.Parameter(positives_C.new_zeros(acts.width, classes))
    bias_C = torch.nn.Parameter(torch.zeros_like(positives_C))
    targets_BC = F.one_hot(labels_B, classes).to(positives_C)
    pos_weight_C = (len(labels_B) - positives_C) / positives_C
    optimizer = torch.optim.Adam([weight_FC, bias_C], lr=1e-2, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-5 / 1e-2) ** (1 / epochs))
    drawn = torch.randperm(len(labels_B), generator=generator).to(labels_B.device).split(batch)
    batches = [(take(acts, rows), targets_BC[rows]) for rows in drawn]
    with threadpool_limits(1):  # the steps are too small to profit from threads
        for _ in range(epochs):
            for i in torch.randperm(len(batches), generator=generator).tolist():
                optimizer.zero_grad()
                logits_BC = decode(batches[i][0], weight_FC, bias_C)
                loss = F.binary_cross_entropy_with_logits(logits_BC, batches[i][1], pos_weight=pos_weight_C)
                (loss + l1 * weight_FC.abs().sum(0).mean()).backward()
                optimizer.step()
            schedule.step()
    return weight_FC.detach().T


def k_sparse_f1(train: Codes, labels_B: Tensor, test: Codes, test_labels_B: Tensor, ranked_CK: Tensor) -> Tensor:
    """Test F1 `[C, K]` of logistic regressions on the first 1, 2, …, K latents of each class in `ranked_CK`.

    The regression is scikit-learn's `LogisticRegression(max_iter=500, class_weight="balanced")`. Samples on which none
    of a class's K latents fires are identical, so they are merged into one sample per label, weighted by their number;
    the objective stays the same.
    """
    from threadpoolctl import threadpool_limits

    latents_U, at_CK = ranked_CK.unique(return_inverse=True)
    train_BU, test_BU = (_columns(acts, latents_U) for acts in (train, test))
    labels, test_labels = labels_B.cpu().numpy(), test_labels_B.cpu().numpy()
    f1_CK = np.zeros(tuple(ranked_CK.shape))
    with threadpool_limits(1):  # the problems are too small to profit from threads
        for c, at_K in enumerate(at_CK.cpu().numpy()):
            x_AK, y_A, weight_A = _collapsed(train_BU[:, at_K], labels == c)
            for k in range(1, len(at_K) + 1):
                predicted_B = _regression(x_AK[:, :k], y_A, weight_A)(test_BU[:, at_K[:k]])
                hits = (predicted_B & (test_labels == c)).sum()
                f1_CK[c, k - 1] = 2 * hits / max(predicted_B.sum() + (test_labels == c).sum(), 1)
    return torch.from_numpy(f1_CK)


def _columns(acts: Codes, latents_U: Tensor) -> np.ndarray:
    """Dense activations `[B, U]` of `latents_U`, which must be ascending."""
    place_N = torch.searchsorted(latents_U, acts.support.latents_N).clamp(max=len(latents_U) - 1)
    kept_N = latents_U[place_N] == acts.support.latents_N
    dense_BU = acts.values_N.new_zeros(acts.support.batch, len(latents_U))
    dense_BU[acts.support.tokens_N[kept_N], place_N[kept_N]] = acts.values_N[kept_N]
    return dense_BU.float().cpu().numpy()


def _collapsed(x_BK: np.ndarray, y_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, labels and balanced weights, with samples that are all zero merged."""
    active_B = x_BK.any(1)
    x_AK = np.concatenate([x_BK[active_B], np.zeros_like(x_BK[:2])])
    y_A = np.append(y_B[active_B], [False, True])
    silent = [(~active_B & ~y_B).sum(), (~active_B & y_B).sum()]
    count_A = np.append(np.ones(active_B.sum()), silent)
    balance_A = np.where(y_A, len(y_B) / (2 * y_B.sum()), len(y_B) / (2 * (~y_B).sum()))
    return x_AK, y_A, count_A * balance_A


def _regression(x_AK: np.ndarray, y_A: np.ndarray, weight_A: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a logistic regression like scikit-learn's; return a function that predicts which samples are positive.

    Minimises mean weighted cross-entropy + Σw²/(2·Σweight), with an unpenalised intercept, by L-BFGS from 0. It uses
    scikit-learn's stopping rules, which matter because it stops well before the optimum, but not its input checks:
    for many small regressions this takes a fifth of the time.
    """
    from scipy.optimize import minimize

    k, total = x_AK.shape[1], weight_A.sum()
    x_AK, share_A, y_A = x_AK.astype(np.float64), weight_A / total, y_A.astype(np.float64)

    def objective(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        w_K, logit_A = coefficients[:k], x_AK @ coefficients[:k] + coefficients[k]
        tail_A = np.exp(-np.abs(logit_A))
        loss_A = np.maximum(logit_A, 0) + np.log(1 + tail_A) - y_A * logit_A
        slope_A = share_A * (np.where(logit_A > 0, 1, tail_A) / (1 + tail_A) - y_A)
        loss = share_A @ loss_A + w_K @ w_K / (2 * total)
        return loss, np.append(slope_A @ x_AK + w_K / total, slope_A.sum())

    stop = {"maxiter": 500, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps}
    found = minimize(objective, np.zeros(k + 1), jac=True, method="L-BFGS-B", options=stop).x
    return lambda x_BK: x_BK @ found[:k] + found[k] > 0
