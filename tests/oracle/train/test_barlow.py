"""Barlow Twins: a step written out, resume, presets, and a smoke run."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from cupel.losses import barlow_twins_loss
from cupel.pretrain.barlow import BarlowTwins
from cupel.seeds import Seed
from pretraining import assert_resumes_bit_equal, assert_steps_count_what_moves, batch, smoke
from toys import blobs, small_encoder

TINY = BarlowTwins(steps=6, batch_size=16, projection=6, projector_width=12, precision="fp32", redundancy=0.01)


@pytest.mark.parametrize("apart", [False, True])
def test_a_step_by_hand(apart: bool) -> None:
    settings = dataclasses.replace(TINY, separate_views=apart)
    learner = settings.learner(small_encoder(), blobs(64), Seed(0))
    net = torch.nn.Sequential(*(copy.deepcopy(learner.state[name]) for name in ("encoder", "projector")))
    loss, numbers = learner.loss(batch())
    x = settings.views(batch())
    parts = list(x.chunk(2)) if apart else [x]
    with torch.no_grad():
        z1, z2 = torch.cat([net(one) for one in parts]).chunk(2)
    torch.testing.assert_close(loss.detach(), barlow_twins_loss(z1, z2, 0.01, 0.1))
    assert set(numbers) == {"feature_std", "projection_std"}


def test_contract() -> None:
    assert_steps_count_what_moves(TINY)


def test_resume(tmp_path) -> None:
    assert_resumes_bit_equal(dataclasses.replace(TINY, precision="bf16"), tmp_path)


def test_presets() -> None:
    nlb = BarlowTwins.preset("nlb_cifar")
    assert (nlb.optimizer, nlb.lr, nlb.weight_decay, nlb.batch_size) == ("lars_clip", 0.3, 1e-5, 256)
    assert (nlb.redundancy, nlb.scale, nlb.projection, nlb.projector_width) == (0.0051, 0.1, 2048, 2048)
    assert nlb.second_augment is not None
    assert nlb.second_augment.solarise == 0.2
    head = nlb.learner(small_encoder(), blobs(32), Seed(0)).projector
    kinds = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(one).__name__ for one in head] == [*kinds, *kinds, "Linear"]


@pytest.mark.full
def test_three_epochs_learn_something() -> None:
    made = smoke(BarlowTwins.preset("fast"))
    print(made)
    assert made["late"] < made["early"]
    assert made["projection_std"] > 0.3
    assert made["knn"] >= made["random"] + 0.03
