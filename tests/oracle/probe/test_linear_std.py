"""`linear_std` against a NumPy transcription of its recipe."""

from __future__ import annotations

import numpy as np
import torch

from cupel.probe.linear_std import LinearStd, StandardisedLinear
from cupel.seeds import Seed


def task(n=70, width=6, classes=3):
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=draw)
    return torch.randn(classes, width, generator=draw)[y] * 2 + torch.randn(n, width, generator=draw), y


def transcription(x, y, probe, seed, classes):
    x, y = x.double().numpy(), y.numpy()
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    z = (u - u.mean(0)) / np.sqrt(u.var(0, ddof=1) + 1e-5)
    draw = seed.child("init").torch()
    bound = x.shape[1] ** -0.5
    w = ((torch.rand(classes, x.shape[1], generator=draw) * 2 - 1) * bound).double().numpy()
    b = ((torch.rand(classes, generator=draw) * 2 - 1) * bound).double().numpy()
    momentum_w, momentum_b, lr = np.zeros_like(w), np.zeros_like(b), probe.lr
    for epoch in range(probe.epochs):
        if epoch in probe.milestones:
            lr *= 0.1
        order = torch.randperm(len(y), generator=seed.child("order", epoch).torch()).numpy()
        for start in range(0, len(y), probe.batch_size):
            rows = order[start : start + probe.batch_size]
            logits = z[rows] @ w.T + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            residual = (p - np.eye(classes)[y[rows]]) / len(rows)
            momentum_w = probe.momentum * momentum_w + residual.T @ z[rows] + probe.weight_decay * w
            momentum_b = probe.momentum * momentum_b + residual.sum(0) + probe.weight_decay * b
            w, b = w - lr * momentum_w, b - lr * momentum_b
    return z @ w.T + b


def test_training_equals_the_transcription():
    x, y = task()
    probe = LinearStd(epochs=7, lr=0.1, weight_decay=0.01, milestones=(3, 5), batch_size=32)  # batches of 32, 32, 6
    head = probe.fit_features(x, y, 3, Seed(4))
    with torch.no_grad():
        np.testing.assert_allclose(head(x).numpy(), transcription(x, y, probe, Seed(4), 3), rtol=1e-4, atol=1e-4)


def test_published_recipe_equals_the_transcription():
    x, y = task(n=300)
    head = LinearStd().fit_features(x, y, 3, Seed(0))
    with torch.no_grad():
        np.testing.assert_allclose(head(x).numpy(), transcription(x, y, LinearStd(), Seed(0), 3), rtol=1e-3, atol=1e-3)
        assert float((head(x).argmax(1) == y).float().mean()) > 0.75


def test_statistics_are_those_of_the_training_set_and_never_move():
    x, y = task()
    head = LinearStd(epochs=1).fit_features(x, y, 3, Seed(0))
    u = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    np.testing.assert_allclose(head.mean.numpy(), u.mean(0), atol=1e-6)
    np.testing.assert_allclose(head.inverse_std.numpy(), (u.var(0, ddof=1) + 1e-5) ** -0.5, rtol=1e-4)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.train()
    with torch.no_grad():
        alone = head(x[:5])
        head(x + 100)  # a shifted test set changes nothing
        assert torch.equal(head(x[:5]), alone)
        torch.testing.assert_close(head(torch.cat([x[:5], x + 100]))[:5], alone)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_training_set_standardised_has_mean_zero_and_deviation_one():
    x, y = task(n=500)
    head = LinearStd(epochs=1).fit_features(x, y, 3, Seed(0))
    z = head.standardise(x)
    assert float(z.mean(0).abs().max()) < 1e-5
    np.testing.assert_allclose(z.std(0).numpy(), 1, atol=2e-3)


def test_first_weights_are_uniform_as_in_a_fresh_layer():
    unit = torch.nn.functional.normalize(torch.randn(10, 400, generator=torch.Generator().manual_seed(0)), dim=1)
    weight = StandardisedLinear(unit, 100, Seed(0).torch()).linear.weight.detach() * 400**0.5
    assert 0.999 < float(weight.abs().max()) <= 1
    assert abs(float(weight.mean())) < 0.01
    assert abs(float(weight.std()) - 3**-0.5) < 0.01
