"""BYOL: a step written out, two pipelines, resume, presets, and a smoke run."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from cupel.augment import BYOLAugment
from cupel.losses import byol_loss
from cupel.pretrain.byol import BYOL
from cupel.seeds import Seed
from pretraining import assert_resumes_bit_equal, assert_steps_count_what_moves, batch, smoke
from toys import blobs, small_encoder

TINY = BYOL(steps=6, batch_size=16, projection=6, projector_width=12, predictor_width=10, precision="fp32")


@pytest.mark.parametrize("apart", [False, True])
def test_a_step_by_hand(apart: bool) -> None:
    settings = dataclasses.replace(TINY, separate_views=apart)
    learner = settings.learner(small_encoder(), blobs(64), Seed(0))
    online = torch.nn.Sequential(*(copy.deepcopy(one) for one in learner.online.values()))
    predictor, slow = copy.deepcopy(learner.predictor), copy.deepcopy(learner.momentum.network)
    loss, _ = learner.loss(batch())
    x = settings.views(batch())
    parts = list(x.chunk(2)) if apart else [x]
    with torch.no_grad():
        p1, p2 = torch.cat([predictor(online(one)) for one in parts]).chunk(2)
        z1, z2 = torch.cat([slow(one) for one in parts]).chunk(2)
    torch.testing.assert_close(loss.detach(), byol_loss(p1, p2, z1, z2))
    loss.backward()
    assert all(one.grad is None for one in learner.momentum.parameters())
    assert all(one.grad is not None for one in learner.parameters())
    before = [one.clone() for one in learner.momentum.network.parameters()]
    torch.optim.SGD(learner.parameters(), lr=0.1).step()
    learner.after_step()
    for mine, old, new in zip(learner.momentum.network.parameters(), before, learner.online.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.99 * old + 0.01 * new)
    for mine, literal in zip(learner.momentum.network.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(mine, literal)  # statistics of its own passes, not averaged


def test_views_of_two_pipelines() -> None:
    still = {"crop": False, "flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0}
    first, second = BYOLAugment(**still), BYOLAugment(**still, solarise=1.0)
    raw = batch().inputs / 255
    for how in ("fused", "exact"):
        both = dataclasses.replace(TINY, augment=first, second_augment=second, augmentation=how).views(batch())
        torch.testing.assert_close(both[:16], raw, atol=1e-5, rtol=0)
        inverted = torch.where(raw > 127.5 / 255, 1 - raw, raw)
        torch.testing.assert_close(both[16:], inverted, atol=1e-5, rtol=0)
    random = dataclasses.replace(TINY, augment=BYOLAugment(), second_augment=BYOLAugment()).views(batch())
    assert not torch.equal(random[:16], random[16:])  # the same pipeline, other draws
    again = dataclasses.replace(TINY, augment=BYOLAugment(), second_augment=BYOLAugment()).views(batch())
    assert torch.equal(random, again)


def test_contract() -> None:
    assert_steps_count_what_moves(TINY)


def test_resume(tmp_path) -> None:
    two = dataclasses.replace(TINY, second_augment=BYOLAugment(solarise=0.5, blur=0.5), precision="bf16")
    assert_resumes_bit_equal(two, tmp_path)


def test_presets() -> None:
    nlb = BYOL.preset("nlb_cifar")
    assert (nlb.optimizer, nlb.lr, nlb.weight_decay, nlb.batch_size) == ("lars_clip", 1.0, 1e-5, 256)
    assert (nlb.projection, nlb.projector_width, nlb.predictor_width) == (256, 4096, 4096)
    assert (nlb.ema_start, nlb.ema_end, nlb.augment.saturation) == (0.99, 1.0, 0.2)
    assert nlb.second_augment is not None
    assert (nlb.augment.solarise, nlb.second_augment.solarise) == (0.0, 0.2)
    ssl = BYOL.preset("sslbkd")
    assert (ssl.optimizer, ssl.lr, ssl.weight_decay, ssl.batch_size) == ("adam", 2e-3, 1e-6, 512)
    assert (ssl.projection, ssl.projector_width, ssl.warmup_steps) == (128, 1024, 500)


def test_ctrls_quarter_of_the_loss_is_a_quarter_of_the_rate() -> None:
    """SGD on L / 4 with rate r and decay d = SGD on L with rate r / 4 and decay 4 d."""
    ctrl = BYOL.preset("ctrl")
    assert (ctrl.ema_start, ctrl.ema_end, ctrl.projection, ctrl.projector_width) == (0.996, 0.996, 256, 2048)
    theirs, ours = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    literal = torch.optim.SGD([theirs], lr=0.06, momentum=0.9, weight_decay=5e-4)
    made = ctrl.make_optimizer([ours])
    for k in range(5):
        for one, scale, optimizer in ((theirs, 0.25, literal), (ours, 1.0, made)):
            optimizer.zero_grad()
            (scale * (one * (k + 1)).square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.full
def test_three_epochs_learn_something() -> None:
    made = smoke(BYOL.preset("fast"))
    print(made)
    assert made["late"] < made["early"]
    assert made["projection_std"] > 0.3
    assert made["knn"] >= made["random"] + 0.03
