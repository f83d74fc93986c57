"""The linear probe is at the optimum: its gradient vanishes, and scikit-learn finds the same probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from cupel.probe.linear import Linear, column_scale
from cupel.seeds import Seed


def task(n=300, width=9, classes=4, spread=1.0):
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=draw)
    x = torch.randn(classes, width, generator=draw)[y] * spread + torch.randn(n, width, generator=draw)
    return x * torch.logspace(-3, 2, width) + torch.arange(width) * 5.0, y  # columns of very different size


def numpy_gradient(head, x, y, l2):
    """Of mean cross entropy + l2/2 ‖W‖² in the standardised columns, in float64."""
    x, y = x.double().numpy(), y.numpy()
    mean, std = x.mean(0), x.std(0)
    z = (x - mean) / std
    weight = head.weight.detach().double().numpy() * std
    bias = head.bias.detach().double().numpy() + head.weight.detach().double().numpy() @ mean
    logits = z @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    residual = p - np.eye(len(weight))[y]
    return residual.T @ z / len(y) + l2 * weight, residual.mean(0)


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_gradient_vanishes_at_the_solution(l2):
    x, y = task()
    head = Linear(normalise=False, l2=l2, subsample=1.0).fit_features(x, y, 4, Seed(0))
    by_weight, by_bias = numpy_gradient(head, x, y, l2)
    assert np.abs(by_weight).max() < 5e-5
    assert np.abs(by_bias).max() < 5e-5
    elsewhere = nn.Linear(9, 4).requires_grad_(False)
    elsewhere.weight.zero_()
    assert np.abs(by_weight).max() < np.abs(numpy_gradient(elsewhere, x, y, l2)[0]).max() / 1000


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_scikit_learn_finds_the_same_probabilities(l2):
    x, y = task()
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    other = LogisticRegression(C=1 / (len(y) * l2), tol=1e-8, max_iter=5000).fit(z, y.numpy())
    head = Linear(normalise=False, l2=l2, subsample=1.0).fit_features(x, y, 4, Seed(0))
    with torch.no_grad():
        ours = head(x).softmax(1)
    np.testing.assert_allclose(ours.numpy(), other.predict_proba(z), atol=1e-3)
    assert float((ours.argmax(1) == y).float().mean()) == pytest.approx(other.score(z, y.numpy()))


def test_head_is_one_linear_layer_on_raw_embeddings():
    x, y = task()
    head = Linear(normalise=False).fit_features(x, y, 4, Seed(0))
    assert type(head) is nn.Linear
    with torch.no_grad():
        assert float((head(x).argmax(1) == y).float().mean()) > 0.6


def test_scale_and_offset_of_columns_do_not_matter():
    x, y = task()
    with torch.no_grad():
        a = Linear(normalise=False).fit_features(x, y, 4, Seed(0))(x).softmax(1)
        moved = x * torch.logspace(3, -2, 9) - 7
        b = Linear(normalise=False).fit_features(moved, y, 4, Seed(0))(moved).softmax(1)
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_a_head_seed_draws_nine_tenths_of_the_rows():
    x, y = task(n=100)
    drawn = torch.randperm(100, generator=Seed(3).child("rows").torch())[:90].sort().values
    a = Linear(normalise=False).fit_features(x, y, 4, Seed(3))
    b = Linear(normalise=False, subsample=1.0).fit_features(x[drawn], y[drawn], 4, Seed(8))
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-6)
    rest = torch.ones(100, dtype=torch.bool).index_fill(0, drawn, False)
    spoiled = x.clone()
    spoiled[rest] = 1e6  # rows that were not drawn do not enter, not even the statistics
    assert torch.equal(Linear(normalise=False).fit_features(spoiled, y, 4, Seed(3)).weight, a.weight)


def test_with_all_rows_every_head_seed_agrees():
    x, y = task()
    heads = [Linear(normalise=False, subsample=1.0).fit_features(x, y, 4, Seed(s)) for s in (0, 1)]
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_columns_that_only_round_are_left_out():
    x, y = task()
    x = torch.cat([x, torch.full((300, 1), 3.7), torch.full((300, 1), 1e3) + 1e-4 * torch.randn(300, 1)], dim=1)
    mean, inverse = column_scale(x)
    assert inverse[-2:].tolist() == [0, 0]
    np.testing.assert_allclose(inverse[:9].numpy(), 1 / x[:, :9].double().numpy().std(0), rtol=1e-4)
    np.testing.assert_allclose(mean.numpy(), x.double().numpy().mean(0), rtol=1e-5)
    head = Linear(normalise=False).fit_features(x, y, 4, Seed(0))
    assert head.weight[:, -2:].abs().max() == 0
    assert head.weight.isfinite().all()


def test_separable_data_without_penalty_ends():
    x = torch.cat([torch.randn(50, 3) - 20, torch.randn(50, 3) + 20])
    y = (torch.arange(100) >= 50).long()
    head = Linear(normalise=False, l2=0.0).fit_features(x, y, 2, Seed(0))
    assert head.weight.isfinite().all()
    assert float((head(x).argmax(1) == y).float().mean()) == 1


def test_unit_length_comes_first():
    """With `normalise`, the head is the raw one fitted on unit embeddings, and blind to their length."""
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(60, 9, generator=g), torch.arange(60) % 4
    unit = torch.nn.functional.normalize(x, dim=1)
    made = Linear().fit_features(x, y, 4, Seed(0))
    raw = Linear(normalise=False).fit_features(unit, y, 4, Seed(0))
    assert torch.allclose(made(x), raw(unit), atol=1e-6)
    assert torch.allclose(made(x * 50), made(x), atol=1e-4)
