"""MoCo: a step written out, queues in order, resume, presets, and a smoke run."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cupel.errors import SettingsError
from cupel.losses import queue_nce
from cupel.pretrain.moco import MoCo
from cupel.seeds import Seed
from pretraining import assert_resumes_bit_equal, assert_steps_count_what_moves, batch, smoke
from toys import blobs, small_encoder

TINY = MoCo(steps=6, batch_size=16, queue_size=32, projection=6, projector_width=12, precision="fp32")


@pytest.mark.parametrize("apart", [False, True])
def test_a_symmetric_step_by_hand(apart: bool) -> None:
    settings = dataclasses.replace(TINY, separate_views=apart)
    learner = settings.learner(small_encoder(), blobs(64), Seed(0))
    online, slow = (
        torch.nn.Sequential(*(copy.deepcopy(one) for one in nets))
        for nets in (learner.online.values(), learner.momentum.network)
    )
    rings = [one.keys.clone() for one in learner.queues]
    loss, _ = learner.loss(batch())
    x = settings.views(batch())
    with torch.no_grad():
        if apart:
            (q1, q2), (k1, k2) = ([net(one) for one in x.chunk(2)] for net in (online, slow))
        else:
            (q1, q2), (k1, k2) = online(x).chunk(2), slow(x).chunk(2)
    expected = 0.5 * (queue_nce(q1, k2, rings[1], 0.2) + queue_nce(q2, k1, rings[0], 0.2))
    torch.testing.assert_close(loss.detach(), expected)
    assert torch.equal(learner.queues[0].keys, rings[0])  # losses first, queue later
    loss.backward()
    assert all(one.grad is None for one in learner.momentum.parameters())
    learner.after_step()
    for queue, before, keys in zip(learner.queues, rings, (k1, k2), strict=True):
        torch.testing.assert_close(queue.keys, torch.cat([F.normalize(keys), before[16:]]))
        assert queue.pointer == 16
    for mine, literal in zip(learner.momentum.network.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(mine, literal)


def test_version_two_has_one_direction_and_one_queue() -> None:
    settings = dataclasses.replace(TINY, symmetric=False)
    learner = settings.learner(small_encoder(), blobs(64), Seed(0))
    online = torch.nn.Sequential(*(copy.deepcopy(one) for one in learner.online.values()))
    slow = copy.deepcopy(learner.momentum.network)
    assert len(learner.queues) == 1
    ring = learner.queues[0].keys.clone()
    loss, _ = learner.loss(batch())
    x1, x2 = settings.views(batch()).chunk(2)
    with torch.no_grad():
        keys = slow(x2)
        torch.testing.assert_close(loss.detach(), queue_nce(online(x1), keys, ring, 0.2))
    loss.backward()
    learner.after_step()
    torch.testing.assert_close(learner.queues[0].keys[:16], F.normalize(keys))


def test_after_a_round_the_first_keys_are_overwritten() -> None:
    learner = TINY.learner(small_encoder(), blobs(64), Seed(0))
    first = None
    for t in range(3):
        learner.loss(batch(seed=t))
        learner.after_step()
        if t == 0:
            first = learner.queues[0].keys[0].clone()
        if t == 1:
            assert learner.queues[0].pointer == 0
            assert torch.equal(learner.queues[0].keys[0], first)
    assert not torch.equal(learner.queues[0].keys[0], first)
    assert learner.momentum.step == 3


def test_contract() -> None:
    assert_steps_count_what_moves(TINY)


@pytest.mark.parametrize("symmetric", [True, False])
def test_resume(tmp_path, symmetric: bool) -> None:
    assert_resumes_bit_equal(dataclasses.replace(TINY, symmetric=symmetric, precision="bf16"), tmp_path)


def test_the_schedule_knows_the_length_of_the_training() -> None:
    by_epochs = dataclasses.replace(TINY, steps=None, epochs=3)
    assert by_epochs.learner(small_encoder(), blobs(70), Seed(0)).momentum.total == 12
    assert TINY.learner(small_encoder(), blobs(70), Seed(0)).momentum.total == 6


def test_a_queue_that_the_batch_does_not_divide() -> None:
    with pytest.raises(SettingsError, match="no multiple of batch_size = 48"):
        MoCo(batch_size=48, queue_size=1000)


def test_presets() -> None:
    nlb = MoCo.preset("nlb_cifar")
    assert (nlb.optimizer, nlb.lr, nlb.weight_decay, nlb.batch_size, nlb.epochs) == ("sgd", 0.3, 1e-5, 256, 500)
    assert (nlb.queue_size, nlb.temperature, nlb.ema_start, nlb.ema_end) == (32_768, 0.2, 0.99, 0.999)
    assert (nlb.projector_width, nlb.projection, nlb.symmetric) == (2048, 128, True)
    assert nlb.lr_at(0, 87_500) == pytest.approx(0.003, abs=2e-4)
    assert nlb.lr_at(1750, 87_500) == pytest.approx(0.3)
    ssl = MoCo.preset("sslbkd")
    assert (ssl.lr, ssl.weight_decay, ssl.epochs, ssl.queue_size, ssl.symmetric) == (0.06, 1e-4, 200, 65_536, False)
    assert (ssl.augment.min_scale, ssl.augment.blur, ssl.augment.grayscale) == (0.2, 0.5, 0.2)
    assert (ssl.augment.min_sigma, ssl.augment.max_sigma) == (0.1, 2.0)
    head = dataclasses.replace(ssl, steps=2).learner(small_encoder(), blobs(32), Seed(0)).online["projector"]
    assert [tuple(one.weight.shape) for one in head if isinstance(one, torch.nn.Linear)] == [(32, 32), (128, 32)]


@pytest.mark.full
def test_three_epochs_learn_something() -> None:
    made = smoke(dataclasses.replace(MoCo.preset("fast"), queue_size=512), fill=16)
    print(made)
    assert made["late"] < made["early"]
    assert made["projection_std"] > 0.3
    assert made["knn"] >= made["random"] + 0.03
