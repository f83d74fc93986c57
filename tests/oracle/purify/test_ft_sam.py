"""Sharpness-aware steps: the ascent in closed form, the gradient at the other point, and ρ = 0."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cupel.inference import FrozenProbe
from cupel.purify.ft_sam import FTSAM
from cupel.purify.labelled import linear_head
from cupel.purify.sharpness import ascent, sharp_loss
from cupel.purify.tuning import FT
from cupel.seeds import Seed
from fingerprints import same_state
from toys import blobs, small_encoder

DATA = blobs(48)


def classifier() -> FrozenProbe:
    encoder = small_encoder(width=4)
    return FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_ascent_against_a_literal_one(adaptive: bool) -> None:
    draw = np.random.default_rng(0)
    w, g = ([draw.normal(size=shape) for shape in ((3, 2), (4,))] for _ in range(2))
    flat_w, flat_g = (np.concatenate([one.ravel() for one in both]) for both in (w, g))
    expected = 0.7 * flat_g / np.linalg.norm(flat_g)
    if adaptive:
        expected = 0.7 * flat_w**2 * flat_g / np.linalg.norm(np.abs(flat_w) * flat_g)
    made = ascent([torch.tensor(one) for one in w], [torch.tensor(one) for one in g], 0.7, adaptive=adaptive)
    np.testing.assert_allclose(np.concatenate([one.numpy().ravel() for one in made]), expected, rtol=1e-12)


def test_without_a_gradient_there_is_no_step() -> None:
    made = ascent([torch.ones(2)], [torch.zeros(2)], 1.0, adaptive=True)
    assert torch.equal(made[0], torch.zeros(2))


def test_the_gradient_is_that_of_the_worst_point_and_the_weights_stay() -> None:
    draw = Seed(0).torch()
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=draw)
    x, y = torch.randn(8, 4, generator=draw, dtype=torch.float64), torch.arange(8) % 3
    before = {name: p.clone() for name, p in net.state_dict().items()}
    loss, out = sharp_loss(net, x, lambda z: F.cross_entropy(z, y), 0.5, adaptive=True)
    loss.backward()
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    other = copy.deepcopy(net)
    other.zero_grad()
    F.cross_entropy(other(x), y).backward()
    steps = ascent(list(net.parameters()), [p.grad for p in other.parameters()], 0.5, adaptive=True)
    with torch.no_grad():
        for p, e in zip(other.parameters(), steps, strict=True):
            p += e
    other.zero_grad()
    there = F.cross_entropy(other(x), y)
    there.backward()
    assert loss.item() == pytest.approx(there.item(), rel=1e-12)
    assert loss.item() > F.cross_entropy(out, y).item()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["frozen", "eval_affine", "train"])
def test_radius_zero_is_plain_fine_tuning_bit_for_bit(mode: Any) -> None:
    same: dict[str, Any] = {"steps": 4, "batch_size": 16, "weight_decay": 1e-3, "batch_norm": mode}
    sam, _ = FTSAM(**same, rho=0.0, label_smoothing=0.0).purify_classifier(classifier(), DATA, Seed(1))
    ft, _ = FT(**same).purify_classifier(classifier(), DATA, Seed(1))
    wide, _ = FTSAM(**same, rho=0.5, label_smoothing=0.0).purify_classifier(classifier(), DATA, Seed(1))
    assert same_state(sam.encoder.module, ft.encoder.module)
    assert same_state(sam.head, ft.head)
    assert not same_state(wide.encoder.module, ft.encoder.module)
