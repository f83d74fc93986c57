"""NAD: attention maps against a literal transcription, and what the distillation does to them."""

import copy

import numpy as np
import pytest
import torch

from cupel.errors import DataError
from cupel.inference import FrozenProbe
from cupel.protocols import Batch
from cupel.purify.labelled import linear_head
from cupel.purify.nad import NAD, NADLearner, attention, attention_distance
from cupel.seeds import Seed
from toys import blobs, small_encoder

DATA = blobs(48)


def classifier(seed: int = 0) -> FrozenProbe:
    encoder = small_encoder(seed, width=4)
    return FrozenProbe(encoder, linear_head(encoder, DATA, 5e-4))


def test_attention_against_a_literal_one() -> None:
    maps = torch.randn(3, 4, 2, 5, generator=Seed(0).torch(), dtype=torch.float64)
    made = attention(maps, 3.0).numpy()
    for n in range(3):
        expected = np.zeros(10)
        for place in range(10):
            for c in range(4):
                expected[place] += abs(float(maps[n, c, place // 5, place % 5])) ** 3
        np.testing.assert_allclose(made[n], expected / np.sqrt((expected**2).sum()), rtol=1e-12)


def test_the_distance_is_nothing_for_equal_layers_and_blind_to_their_scale() -> None:
    draw = Seed(1).torch()
    a, b = (torch.randn(3, 4, 2, 5, generator=draw) for _ in range(2))
    assert float(attention_distance(a, a)) == 0
    assert float(attention_distance(a, b)) > 1e-3
    torch.testing.assert_close(attention_distance(7 * a, b), attention_distance(a, b))
    torch.testing.assert_close(attention_distance(a, 0.1 * b), attention_distance(a, b))
    literal = sum(float(((attention(a)[n] - attention(b)[n]) ** 2).sum()) for n in range(3)) / (3 * 10)
    assert float(attention_distance(a, b)) == pytest.approx(literal, rel=1e-5)


def test_student_and_teacher_alike_leave_the_cross_entropy_alone() -> None:
    model, rows = classifier(), torch.arange(16)
    batch = Batch(DATA.inputs[rows], rows, Seed(0))
    learner = NADLearner(NAD(augment=None), model, copy.deepcopy(model), DATA.labels)
    loss, parts = learner.loss(batch)
    assert float(parts["attention"]) == pytest.approx(0, abs=1e-6)
    assert float(loss.detach()) == pytest.approx(float(parts["cross_entropy"]), rel=1e-5)
    other = NADLearner(NAD(augment=None, betas=(0.0, 0.0, 50.0)), model, classifier(1), DATA.labels)
    loss, parts = other.loss(batch)
    assert float(parts["attention"]) > 0
    loss.backward()
    assert all(p.grad is None for p in other.teacher.parameters())
    assert model.head.weight.grad is not None


def test_distillation_brings_the_attentions_together() -> None:
    settings = NAD(augment=None, batch_size=48, epochs=20, teacher_epochs=10, lr=0.005, betas=(5.0, 10.0, 10.0))
    _, history = settings.purify_classifier(classifier(), DATA, Seed(0))
    assert len(history["loss"]) == 20
    assert history["attention"][-1] < 0.7 * max(history["attention"])
    assert history["cross_entropy"][-1] < history["cross_entropy"][0]


def test_more_betas_than_blocks_are_refused() -> None:
    with pytest.raises(DataError, match="6 betas for an encoder of 5 blocks"):
        NAD(betas=(1.0,) * 6, steps=1, batch_size=16).purify(small_encoder(width=4), DATA, Seed(0))
