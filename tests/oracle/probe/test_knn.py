"""k-NN against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cupel.probe.knn
from cupel.probe.knn import Knn
from cupel.seeds import Seed


def by_loops(queries, bank, labels, num_classes, k, t):
    shares = np.zeros((len(queries), num_classes))
    for i, q in enumerate(queries):
        similarity = [float(q @ b / (np.linalg.norm(q) * np.linalg.norm(b))) for b in bank]
        near = sorted(range(len(bank)), key=lambda row: -similarity[row])[:k]
        for row in near:
            shares[i, labels[row]] += math.exp(similarity[row] / t)
        shares[i] /= shares[i].sum()
    return shares


def sets(n=50, m=23, width=7, classes=4):
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(n, width, generator=draw) * 3, torch.randn(m, width, generator=draw) * 0.1
    return bank, queries, torch.randint(classes, (n,), generator=draw)


@pytest.mark.parametrize("k", [1, 20, 50, 200])
@pytest.mark.parametrize("t", [0.5, 0.1])
def test_votes_equal_the_loops(k, t):
    bank, queries, y = sets()
    head = Knn(k=k, temperature=t).fit_features(bank, y, 4, Seed(0))
    want = by_loops(queries.double().numpy(), bank.double().numpy(), y.tolist(), 4, k, t)
    np.testing.assert_allclose(head(queries).softmax(1).numpy(), want, rtol=1e-4, atol=1e-6)


def test_blocks_do_not_matter(monkeypatch):
    bank, queries, y = sets()
    head = Knn(k=9).fit_features(bank, y, 4, Seed(0))
    whole = head(queries)
    for block in (1, 50 * 3, 50 * 22):
        monkeypatch.setattr(cupel.probe.knn, "BLOCK", block)
        torch.testing.assert_close(head(queries), whole, rtol=1e-4, atol=1e-5)


def test_lengths_do_not_matter():
    bank, queries, y = sets()
    scale = torch.rand(50, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    a = Knn(k=9).fit_features(bank, y, 4, Seed(0))(queries)
    b = Knn(k=9).fit_features(bank * scale, y, 4, Seed(0))(queries * 40)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_weights_let_one_close_neighbour_beat_two_far_ones():
    bank, y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert Knn(k=3, temperature=0.5).fit_features(bank, y, 2, Seed(0))(query).argmax() == 0  # e² against 2
    assert Knn(k=3, temperature=5.0).fit_features(bank, y, 2, Seed(0))(query).argmax() == 1


def test_small_temperatures_do_not_overflow():
    bank, queries, y = sets()
    head = Knn(k=9, temperature=1e-3).fit_features(bank, y, 4, Seed(0))
    assert head(queries).isfinite().all()
    nearest = torch.cosine_similarity(queries[:, None], bank[None], dim=2).argmax(1)
    assert torch.equal(head(queries).argmax(1), y[nearest])
