"""Supervised pre-training: the loss by hand, the views, labels by row, errors on bad labels, and that it learns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from cupel.augment import ShiftFlip
from cupel.encoders import Fast
from cupel.errors import DataError, Interrupted, LabelsWithheld, UsageError
from cupel.pretrain.supervised import Supervised
from cupel.probe.linear import Linear
from cupel.progress import request_stop
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.train import fit
from cupel.types import Dataset
from toys import blobs, small_encoder

SMALL = Fast(width=4, input_size=16)


PLAIN = ShiftFlip()


def test_views_are_what_the_augmentation_makes():
    learner = Supervised(precision="fp32").learner(SMALL.build(Seed(0)), blobs(64), Seed(0))
    seen = []
    learner.encode = lambda x: (seen.append(x), learner.state["encoder"](x))[1]
    learner.loss(Batch(blobs(64).inputs, torch.arange(64), Seed(0)))
    assert torch.equal(seen[0], PLAIN(blobs(64).inputs, Seed(0).torch()))


def logits_are(learner, weight, bias):
    with torch.no_grad():
        learner.head.weight.copy_(weight)
        learner.head.bias.copy_(bias)


def test_loss_and_accuracy_on_logits_made_by_hand():
    data = blobs(8)
    learner = Supervised(augment=None, precision="fp32").learner(SMALL.build(Seed(0)), data, Seed(0))
    logits_are(learner, torch.zeros(4, 16), torch.tensor([3.0, 2.0, 1.0, 0.0]))
    rows = torch.tensor([0, 5, 3])  # classes 0, 1, 3
    loss, numbers = learner.loss(Batch(data.inputs[rows], rows, Seed(0)))
    total = math.log(math.exp(3) + math.exp(2) + math.exp(1) + 1)
    assert loss.item() == pytest.approx(((total - 3) + (total - 2) + total) / 3, abs=1e-6)
    assert numbers["accuracy"].item() == pytest.approx(1 / 3)


def test_labels_go_with_the_rows_not_with_the_place_in_the_batch():
    data = blobs(32)
    learner = Supervised(augment=None, precision="fp32").learner(SMALL.build(Seed(0)), data, Seed(0))
    rows = torch.randperm(32, generator=Seed(1).torch())[:16]
    loss, _ = learner.loss(Batch(data.inputs[rows], rows, Seed(0)))
    logits = learner.head(learner.state["encoder"](data.inputs[rows].float() / 255))
    torch.testing.assert_close(loss, F.cross_entropy(logits, data.labels[rows]))


def labelled(labels: torch.Tensor) -> Dataset:
    return dataclasses.replace(blobs(8), labels_=labels)


def test_bad_labels_are_refused_in_one_line():
    encoder = SMALL.build(Seed(0))
    with pytest.raises(DataError, match="2 of 8 images have no label"):
        Supervised().learner(encoder, labelled(torch.tensor([0, 1, 2, 3, -1, -1, 0, 1])), Seed(0))
    with pytest.raises(UsageError, match="class index 4 is outside the 4 classes"):
        Supervised().learner(encoder, labelled(torch.tensor([0, 1, 2, 3, 4, 0, 0, 1])), Seed(0))
    with pytest.raises(LabelsWithheld):
        Supervised().learner(encoder, blobs(8).without_labels("supervised"), Seed(0))


def test_classes_without_an_image_have_an_output_too():
    data = dataclasses.replace(blobs(8), labels_=torch.zeros(8, dtype=torch.int64))
    learner = Supervised().learner(SMALL.build(Seed(0)), data, Seed(0))
    assert learner.head.out_features == 4


def test_presets():
    badnets, fast = Supervised.preset("badnets"), Supervised.preset("fast")
    assert (badnets.optimizer, badnets.lr, badnets.weight_decay, badnets.momentum) == ("sgd", 0.1, 5e-4, 0.9)
    assert (badnets.batch_size, badnets.epochs, badnets.schedule, badnets.steps) == (128, 100, "cosine", None)
    assert badnets.augment == fast.augment == PLAIN
    assert 600 <= fast.steps <= 1200
    assert Supervised().needs == {"labels"}


def run(folder, stop_at: int | None = None):
    objective, data = Supervised(steps=8, batch_size=16), blobs(64)
    encoder, seen = SMALL.build(Seed(3)), []
    learner = objective.learner(encoder, data, Seed(3))

    def watch() -> dict[str, float]:
        seen.append(1)
        if len(seen) == stop_at:
            request_stop(2)
        return {"seen": 1.0}

    history = fit(learner, data, objective, Seed(3), label="t", checkpoint=folder / "state", watch=watch, watch_every=1)
    return learner, history


def test_resume_is_bit_equal(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, history = run(tmp_path / "whole")
    try:
        with pytest.raises(Interrupted):
            run(tmp_path / "broken", stop_at=5)
    finally:
        request_stop(None)
    resumed, again = run(tmp_path / "broken")
    assert again["loss"] == history["loss"]
    assert len(again["seen@watch"]) == 8
    for name, value in whole.state.state_dict().items():
        assert torch.equal(value, resumed.state.state_dict()[name]), name


def test_global_generator_is_left_alone_and_the_seed_decides():
    before = torch.get_rng_state()
    a, b, c = (Supervised().learner(small_encoder(), blobs(8), Seed(s)).head.weight for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_it_learns_the_blobs():
    data, test = blobs(256), blobs(128, seed=1)
    objective = Supervised(steps=60, batch_size=64, lr=3e-3, augment=ShiftFlip(padding=1, flip=0.0))
    encoder = Fast(width=8, input_size=16).build(Seed(0))
    fresh = encoder.copy()
    learner = objective.learner(encoder, data, Seed(0))
    history = fit(learner, data, objective, Seed(0), label="t")
    encoder.module.eval()
    assert sum(history["accuracy"][-5:]) / 5 > 0.9
    assert sum(history["accuracy"][:3]) / 3 < 0.6

    def probe(encoder, few: int = 40) -> float:
        some = data.subset(torch.arange(few))
        made = Linear().fit(encoder, some, Seed(0))
        with torch.no_grad():
            return float((made(test.inputs.float() / 255).argmax(1) == test.labels).float().mean())

    assert probe(encoder) > max(0.9, probe(fresh) + 0.1)
