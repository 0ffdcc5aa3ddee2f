"""k-sparse probes against scikit-learn, dense training and planted latents."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional as F

from c2r.eval.absorption.sparse_probes import k_sparse_f1, l1_probe
from c2r.kernels.codes import from_dense


def sparse_samples(n: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sparse activations of which some latents lean towards one class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    rate = torch.full((n, width), 0.06)
    rate[torch.arange(width) % (2 * classes) == labels[:, None]] = 0.45
    fires = torch.rand(n, width, generator=generator) < rate
    return fires * torch.rand(n, width, generator=generator) * 3, labels


def test_f1_is_that_of_scikit_learn_on_all_samples() -> None:
    train, y = sparse_samples(400, 40, 4, 0)
    test, y_test = sparse_samples(150, 40, 4, 1)
    ranked = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(c))[:6] for c in range(4)])
    found = k_sparse_f1(from_dense(train), y, from_dense(test), y_test, ranked)
    for c in range(4):
        for k in range(1, 7):
            columns = ranked[c, :k]
            model = LogisticRegression(max_iter=500, class_weight="balanced")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(train[:, columns].numpy(), (y == c).numpy())
            expected = f1_score((y_test == c).numpy(), model.predict(test[:, columns].numpy()))
            assert found[c, k - 1].item() == pytest.approx(expected, abs=1e-9)


def test_f1_of_planted_and_silent_latents() -> None:
    y = torch.arange(60) % 3
    acts = torch.zeros(60, 5)
    acts[torch.arange(60), y] = 1.0
    acts[:, 3] = torch.linspace(0, 1, 60)
    ranked = torch.tensor([[0, 3], [1, 3], [4, 2]])  # latent 4 never fires; latent 2 is class 2's own
    found = k_sparse_f1(from_dense(acts), y, from_dense(acts), y, ranked)
    assert found[:2].tolist() == [[1, 1], [1, 1]]
    assert found[2].tolist() == [0, 1]


@pytest.mark.parametrize("batch", [64, 4096, None])
def test_the_l1_probe_is_that_of_dense_training(batch: int | None) -> None:
    acts, y = sparse_samples(150, 30, 3, 2)
    found = l1_probe(from_dense(acts), y, 3, epochs=6, batch=batch, seed=5)
    batch = batch or 150 // 16
    linear = torch.nn.Linear(30, 3)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    positives = torch.bincount(y).float()
    criterion = torch.nn.BCEWithLogitsLoss(pos_weight=(150 - positives) / positives)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=1e-6)
    generator = torch.Generator().manual_seed(5)
    batches = torch.randperm(150, generator=generator).split(batch)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1e-5 / 1e-2) ** (epoch / 6)
        for rows in (batches[i] for i in torch.randperm(len(batches), generator=generator)):
            loss = criterion(linear(acts[rows]), F.one_hot(y[rows], 3).float())
            loss = loss + 0.01 * linear.weight.abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(found, linear.weight.detach(), rtol=0, atol=1e-5)


def test_the_l1_probe_ranks_planted_latents_first_and_leaves_silent_ones_at_zero() -> None:
    y = torch.arange(300) % 4
    acts = (torch.rand(300, 20, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    acts[:, 12:] = 0
    acts[torch.arange(300), 4 + y] = 2.0
    weight = l1_probe(from_dense(acts), y, 4)
    assert weight.argmax(1).tolist() == [4, 5, 6, 7]
    assert bool((weight[:, 12:] == 0).all())
    assert bool((weight[:, 4:12] != 0).any())


def test_a_class_without_a_sample_is_named() -> None:
    with pytest.raises(ValueError, match=r"classes \[1\] have no sample"):
        l1_probe(from_dense(torch.ones(3, 2)), torch.tensor([0, 0, 2]), 3)


def test_the_order_of_samples_changes_nothing() -> None:
    acts, y = sparse_samples(120, 12, 3, 4)
    order = torch.from_numpy(np.random.default_rng(0).permutation(120))
    ranked = torch.arange(12)[None].expand(3, 12)[:, :4]
    one = k_sparse_f1(from_dense(acts), y, from_dense(acts), y, ranked)
    other = k_sparse_f1(from_dense(acts[order]), y[order], from_dense(acts[order]), y[order], ranked)
    torch.testing.assert_close(one, other)
