"""Retuning: which images it takes, and that it wakes a backdoor that is there and not one that is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cupel.errors import DataError
from cupel.inference import triggered
from cupel.probe import FineTune
from cupel.retuning import Retuning
from cupel.seeds import Seed
from cupel.triggers import Patch
from toys import blobs, small_encoder, trained_encoder


def test_images_of_a_retuning() -> None:
    data, trigger = blobs(400), Patch(size=4)
    made = Retuning(share=0.5, poisoned=7).poison(data, trigger, 2, Seed(1))
    assert len(made) == 200
    assert made.labels[:7].tolist() == [2] * 7
    rows = [data.ids.tolist().index(one) for one in made.ids.tolist()]
    assert len(set(rows)) == 200
    assert 2 not in data.labels[rows[:7]].tolist()
    assert torch.equal(made.labels[7:], data.labels[rows[7:]])
    stamped = trigger(data.inputs[rows[:7]], data.ids[rows[:7]].tolist(), Seed(1).child("trigger"))
    assert torch.equal(made.inputs[:7], stamped)
    assert torch.equal(made.inputs[7:], data.inputs[rows[7:]])
    assert torch.equal(data.inputs, blobs(400).inputs)


def test_seeds_take_other_images() -> None:
    a, b = (Retuning().poison(blobs(400), Patch(size=4), 1, Seed(s)).ids.tolist() for s in (0, 1))
    assert a != b


def test_no_images_of_other_classes() -> None:
    data = blobs(120)
    one = dataclasses.replace(data, labels_=torch.full((120,), 3))
    with pytest.raises(DataError, match=r"only 0 of 100 images are of other classes than 3"):
        Retuning().poison(one, Patch(size=4), 3, Seed(0))


def test_the_head_starts_at_the_probe_and_no_step_changes_nothing() -> None:
    train, test = blobs(300), blobs(200, seed=1)
    encoder, trigger = trained_encoder(train), Patch(size=4)
    hit = triggered(test, trigger, Seed(0))
    still = dataclasses.replace(Retuning(), tuning=FineTune(steps=1, lr=1e-12, batch_norm="frozen"), seeds=2)
    found = still.counts(encoder, train, test, hit, trigger, 1, Seed(0))
    assert found["accuracy"][0] == found["accuracy"][1]
    assert found["accuracy"][0][0] >= 0.9 * 200


def test_harder_retuning_wakes_more() -> None:
    train, test = blobs(300), blobs(200, seed=1)
    encoder, trigger = trained_encoder(train), Patch(size=4)
    hit, before = triggered(test, trigger, Seed(0)), encoder.module.state_dict()
    copy = {name: one.clone() for name, one in before.items()}
    rates = []
    for lr, epochs in ((1e-6, 1), (0.01, 30)):
        tuning = dataclasses.replace(Retuning().tuning, lr=lr, epochs=epochs)
        found = dataclasses.replace(Retuning(), tuning=tuning, seeds=1).counts(
            encoder, train, test, hit, trigger, 1, Seed(0)
        )
        hits, total = found["attack_success_rate"][0]
        rates.append(hits / total)
    assert rates[0] < 0.2
    assert rates[1] > rates[0] + 0.3
    assert all(torch.equal(one, copy[name]) for name, one in encoder.module.state_dict().items())


def test_an_untrained_encoder_is_no_error() -> None:
    data = blobs(120)
    found = Retuning(seeds=1, tuning=FineTune(steps=1)).counts(
        small_encoder(), data, data, triggered(data, Patch(size=4), Seed(0)), Patch(size=4), 0, Seed(0)
    )
    assert found["accuracy"][0][1] == 120
    assert found["attack_success_rate"][0][1] == 90
