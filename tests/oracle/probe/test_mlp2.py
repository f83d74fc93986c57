"""`mlp2` against a NumPy transcription of its recipe: shapes, Adam, dropout, order of the images."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from cupel.probe.mlp2 import Mlp2
from cupel.seeds import Seed


def task(n=22, width=5, classes=3):
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=draw)
    return torch.randn(classes, width, generator=draw)[y] * 2 + torch.randn(n, width, generator=draw), y


def transcription(x, y, probe, seed, classes, orders):
    """Forward, backward and Adam by hand, in float64."""
    u, y = x.double().numpy(), y.numpy()
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    draw, sizes, theta = seed.child("init").torch(), (x.shape[1], 512, 256, classes), []
    for a, b in pairwise(sizes):
        for shape in ((b, a), (b,)):
            theta.append(((torch.rand(shape, generator=draw) * 2 - 1) * a**-0.5).double().numpy())
    first, second, step = [0 * t for t in theta], [0 * t for t in theta], 0
    for epoch in range(probe.epochs):
        masks = seed.child("dropout", epoch).torch()
        for start in range(0, len(y), probe.batch_size):
            rows = orders[epoch][start : start + probe.batch_size]
            w1, b1, w2, b2, w3, b3 = theta
            keep = np.ones((len(rows), 512))
            if probe.dropout:
                chance = 1 - probe.dropout
                keep = torch.empty(len(rows), 512).bernoulli_(chance, generator=masks).numpy() / chance
            a1 = u[rows] @ w1.T + b1
            h1 = np.maximum(a1, 0) * keep
            a2 = h1 @ w2.T + b2
            h2 = np.maximum(a2, 0)
            logits = h2 @ w3.T + b3
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            d3 = (p - np.eye(classes)[y[rows]]) / len(rows)
            d2 = d3 @ w3 * (a2 > 0)
            d1 = d2 @ w2 * keep * (a1 > 0)
            gradient = [d1.T @ u[rows], d1.sum(0), d2.T @ h1, d2.sum(0), d3.T @ h2, d3.sum(0)]
            step += 1
            for i, g in enumerate(gradient):
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g**2
                corrected = np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
                theta[i] = theta[i] - probe.lr * first[i] / (1 - 0.9**step) / corrected
    w1, b1, w2, b2, w3, b3 = theta
    return np.maximum(np.maximum(u @ w1.T + b1, 0) @ w2.T + b2, 0) @ w3.T + b3


def check(probe, orders):
    x, y = task()
    head = probe.fit_features(x, y, 3, Seed(4))
    with torch.no_grad():
        np.testing.assert_allclose(head(x).numpy(), transcription(x, y, probe, Seed(4), 3, orders), atol=2e-4)


def test_training_equals_the_transcription_in_the_order_of_the_file():
    check(Mlp2(epochs=4, lr=1e-3, batch_size=8, dropout=0.0), [np.arange(22)] * 4)


def test_dropout_equals_the_transcription():
    check(Mlp2(epochs=4, lr=1e-3, batch_size=8), [np.arange(22)] * 4)


def test_shuffling_equals_the_transcription():
    orders = [torch.randperm(22, generator=Seed(4).child("order", epoch).torch()).numpy() for epoch in range(4)]
    check(Mlp2(epochs=4, lr=1e-3, batch_size=8, shuffle=True), orders)


def test_order_of_the_rows_matters_without_shuffling():
    x, y = task()
    flipped = Mlp2(epochs=2, lr=1e-3, batch_size=8, dropout=0.0).fit_features(x.flip(0), y.flip(0), 3, Seed(4))
    plain = Mlp2(epochs=2, lr=1e-3, batch_size=8, dropout=0.0).fit_features(x, y, 3, Seed(4))
    with torch.no_grad():
        assert not torch.allclose(flipped(x), plain(x), atol=1e-4)


def test_shapes_of_the_published_head():
    x, y = task()
    head = Mlp2(epochs=1).fit_features(x, y, 10, Seed(0))
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "fc1.weight": (512, 5),
        "fc1.bias": (512,),
        "fc2.weight": (256, 512),
        "fc2.bias": (256,),
        "fc3.weight": (10, 256),
        "fc3.bias": (10,),
    }


def test_lengths_of_embeddings_do_not_matter():
    x, y = task()
    head = Mlp2(epochs=2).fit_features(x, y, 3, Seed(0))
    with torch.no_grad():
        torch.testing.assert_close(head(x), head(7 * x))
        torch.testing.assert_close(
            head(x), Mlp2(epochs=2).fit_features(0.1 * x, y, 3, Seed(0))(x), atol=1e-5, rtol=1e-4
        )


def test_it_learns():
    x, y = task(n=200)
    head = Mlp2(epochs=30, lr=1e-3).fit_features(x, y, 3, Seed(0))
    with torch.no_grad():
        assert float((head(x).argmax(1) == y).float().mean()) > 0.85
