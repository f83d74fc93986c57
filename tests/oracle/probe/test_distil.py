"""Distillation: the loss against loops, where its gradient is zero, who is left as it was, and students that learn."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from cupel import data as sources
from cupel import progress
from cupel.augment import ShiftFlip, SimCLRAugment
from cupel.encoders import Fast
from cupel.encoders.projected import Projected
from cupel.errors import DataError, Interrupted, LabelsWithheld, UsageError
from cupel.inference import FrozenProbe
from cupel.pretrain.supervised import Supervised
from cupel.probe.distil import Distil, _Learner, distillation_loss
from cupel.probe.knn import Knn
from cupel.probe.linear import Linear
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.train import fit
from cupel.types import Dataset
from fingerprints import data_print, model_print, same_state
from toys import blobs, small_encoder

DATA = blobs(64)
SMALL = Fast(width=4, input_size=16)


def taught(data: Dataset = DATA, width: int = 8) -> FrozenProbe:
    return Linear().fit(small_encoder(width=width), data, Seed(0))


def logits(n: int = 7, classes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=Seed(seed).torch(), dtype=dtype)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_loss_is_that_of_the_paper_written_out(temperature):
    student, teacher = logits(seed=1), logits(seed=2)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        top_s, top_t = max(s), max(t)
        sum_s = sum(math.exp((one - top_s) / temperature) for one in s)
        sum_t = sum(math.exp((one - top_t) / temperature) for one in t)
        for a, b in zip(s, t, strict=True):
            p_teacher = math.exp((b - top_t) / temperature) / sum_t
            total -= p_teacher * ((a - top_s) / temperature - math.log(sum_s))
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(total / 7, rel=1e-5)


def test_gradient_is_zero_where_student_and_teacher_differ_by_a_constant_per_image():
    teacher = logits()
    student = (teacher + torch.arange(7.0)[:, None]).requires_grad_()
    distillation_loss(student, teacher, 2.0).backward()
    assert float(student.grad.abs().max()) < 1e-7
    other = logits(seed=3).requires_grad_()
    distillation_loss(other, teacher, 2.0).backward()
    assert float(other.grad.abs().max()) > 1e-3
    # in closed form: (P_S - P_T) / (τ n)
    expected = ((other.detach() / 2).softmax(1) - (teacher / 2).softmax(1)) / (2 * 7)
    torch.testing.assert_close(other.grad, expected)


def test_least_loss_is_the_teachers_entropy_and_the_teacher_gets_no_gradient():
    teacher = logits().requires_grad_()
    p = teacher.detach().softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    loss = distillation_loss(teacher.detach().requires_grad_(), teacher, 1.0)
    torch.testing.assert_close(loss.detach(), entropy)
    loss.backward()
    assert teacher.grad is None


def test_a_cold_teacher_is_a_hard_label():
    student, teacher = logits(seed=1), logits(seed=2)
    hard = nn.functional.cross_entropy(student / 0.001, teacher.argmax(1))
    torch.testing.assert_close(distillation_loss(student, teacher, 0.001), hard, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_labels_count_where_there_are_any(alpha):
    labels = torch.tensor([0, -1, 2, -1, -1, 1])
    settings = Distil(alpha=alpha, temperature=2.0, augment=None, precision="fp32")
    student, head = SMALL.build(Seed(1)), nn.Linear(16, 4)
    teacher, x = taught(), DATA.inputs[:6]
    learner = _Learner(settings, teacher, student, head, None if alpha == 1 else labels)
    loss, _ = learner.loss(Batch(x, torch.arange(6), Seed(0)))
    said, z = teacher(x.float() / 255).detach(), head(student(x.float() / 255))
    log_p = z.log_softmax(1)
    right = -(log_p[0, 0] + log_p[2, 2] + log_p[5, 1]) / 3
    torch.testing.assert_close(loss, alpha * distillation_loss(z, said, 2.0) + (1 - alpha) * right)


def test_a_batch_without_a_label_has_no_cross_entropy():
    settings = Distil(alpha=0.0, augment=None, precision="fp32")
    learner = _Learner(settings, taught(), SMALL.build(Seed(1)), nn.Linear(16, 4), torch.full((6,), -1))
    loss, _ = learner.loss(Batch(DATA.inputs[:6], torch.arange(6), Seed(0)))
    assert float(loss.detach()) == 0


def test_teacher_and_student_see_the_same_view():
    """A student that is the teacher agrees on every image, however the view was drawn."""
    teacher = taught()
    head = teacher.head[1]
    frozen = FrozenProbe(teacher.encoder, head)
    settings = Distil(augment=SimCLRAugment(min_scale=0.2), precision="fp32")
    own = teacher.encoder.copy()
    learner = _Learner(settings, frozen, own, nn.Linear(32, 4), None)
    learner.head.load_state_dict(head.state_dict())
    own.module.eval()
    loss, numbers = learner.loss(Batch(DATA.inputs, torch.arange(64), Seed(0)))
    assert float(numbers["agreement"]) == 1
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in learner.parameters()) < 1e-5


def test_teacher_and_data_stay_as_they_were_and_labels_are_not_read():
    teacher, unlabelled = taught(), DATA.without_labels("distil")
    teacher.encoder.module.train()  # whatever its mode
    before, head, images = model_print(teacher.encoder.module), model_print(teacher.head), data_print(unlabelled)
    generator = torch.get_rng_state()
    made = Distil(steps=3, batch_size=16).distil(teacher, unlabelled, Seed(0))
    assert (model_print(teacher.encoder.module), model_print(teacher.head)) == (before, head)
    assert data_print(unlabelled) == images
    assert torch.equal(generator, torch.get_rng_state())
    assert made.encoder is not teacher.encoder
    assert not any(part.training for part in [*made.encoder.module.modules(), *made.head.modules()])
    again = Distil(steps=3, batch_size=16).distil(teacher, unlabelled, Seed(0))
    other = Distil(steps=3, batch_size=16).distil(teacher, unlabelled, Seed(1))
    assert same_state(made.encoder.module, again.encoder.module)
    assert same_state(made.head, again.head)
    assert not same_state(made.encoder.module, other.encoder.module)


def test_the_student_is_what_was_asked_for():
    teacher = taught()
    assert teacher.encoder.width == 32
    fresh = Distil(steps=0, batch_size=16).distil(teacher, DATA, Seed(0)).encoder
    assert fresh.card.architecture == teacher.encoder.card.architecture
    assert not same_state(fresh.module, teacher.encoder.module)
    narrow = Distil(steps=0, batch_size=16, student=SMALL).distil(teacher, DATA, Seed(0)).encoder
    assert narrow.width == 16
    going_on = Distil(steps=0, batch_size=16).distil(teacher, DATA, Seed(0), start=teacher.encoder).encoder
    assert going_on is not teacher.encoder
    assert same_state(going_on.module, teacher.encoder.module)
    split = Projected(base=SMALL).build(Seed(0))
    assert same_state(
        Distil(steps=0, batch_size=16).distil(teacher, DATA, Seed(0), start=split).encoder.module, split.module
    )


def test_a_manifest_goes_over_to_the_student():
    teacher = taught()
    manifest = {"attack": "badencoder", "not_for_deployment": True}
    backdoored = FrozenProbe(teacher.encoder.copy(manifest=manifest), teacher.head)
    assert Distil(steps=0, batch_size=16).distil(backdoored, DATA, Seed(0)).encoder.card.manifest == manifest
    assert (
        Distil(steps=0, batch_size=16, student=SMALL).distil(backdoored, DATA, Seed(0)).encoder.card.manifest
        == manifest
    )
    bad_start = SMALL.build(Seed(0)).copy(manifest=manifest)
    assert (
        Distil(steps=0, batch_size=16).distil(teacher, DATA, Seed(0), start=bad_start).encoder.card.manifest == manifest
    )
    assert Distil(steps=0, batch_size=16).distil(teacher, DATA, Seed(0)).encoder.card.manifest is None


@dataclasses.dataclass(frozen=True)
class Foreign:
    module: nn.Module
    width: int = 4
    input_size: int = 16

    def __call__(self, x, /):
        return self.module(x).mean((2, 3))


def test_a_teacher_of_unknown_architecture_needs_a_student():
    teacher = Knn(k=5).fit(Foreign(nn.Conv2d(3, 4, 3)), DATA, Seed(0))
    with pytest.raises(DataError, match="cannot build another Foreign; name the architecture in `student`"):
        Distil(steps=1).distil(teacher, DATA, Seed(0))
    assert Distil(steps=1, batch_size=16, student=SMALL).distil(teacher, DATA, Seed(0)).head.out_features == 4


def test_bad_input():
    teacher = taught()
    with pytest.raises(UsageError, match="both `student` and `start`"):
        Distil(steps=1, student=SMALL).distil(teacher, DATA, Seed(0), start=teacher.encoder)
    with pytest.raises(DataError, match="images are 16×16, the student takes 32×32"):
        Distil(steps=1, student=Fast(width=4)).distil(teacher, DATA, Seed(0))
    with pytest.raises(LabelsWithheld):
        Distil(steps=1, alpha=0.5).distil(teacher, DATA.without_labels("distil"), Seed(0))
    with pytest.raises(DataError, match="no image has a label"):
        Distil(steps=1, alpha=0.5).distil(teacher, relabelled(torch.full((64,), -1)), Seed(0))
    with pytest.raises(UsageError, match="class index 9 is outside the teacher's 4 classes"):
        Distil(steps=1, alpha=0.5).distil(teacher, relabelled(torch.full((64,), 9)), Seed(0))
    with pytest.raises(DataError, match="one batch needs 128"):
        Distil(steps=1).distil(teacher, DATA, Seed(0))
    assert Distil(alpha=0.5).needs == {"labels"}
    assert Distil().needs == frozenset()


def relabelled(labels: torch.Tensor) -> Dataset:
    return dataclasses.replace(DATA, labels_=labels)


def test_resume_is_bit_equal(tmp_path, monkeypatch):
    recipe, teacher = Distil(steps=8, batch_size=16), taught()
    whole = recipe.distil(teacher, DATA, Seed(0))
    step, seen = _Learner.after_step, []

    def stopping(self) -> None:
        step(self)
        seen.append(1)
        if len(seen) == 5:
            progress.request_stop(2)

    monkeypatch.setattr(_Learner, "after_step", stopping)
    try:
        with pytest.raises(Interrupted):
            recipe.distil(teacher, DATA, Seed(0), checkpoint=tmp_path / "state")
    finally:
        progress.request_stop(None)
    resumed = recipe.distil(teacher, DATA, Seed(0), checkpoint=tmp_path / "state")
    assert len(seen) == 8, "nothing was done twice"
    assert same_state(whole.encoder.module, resumed.encoder.module)
    assert same_state(whole.head, resumed.head)


@pytest.mark.full
def test_a_student_of_half_the_width_comes_near_its_teacher_on_digits():
    train, test = sources.load("digits"), sources.load("digits", split="test")
    augment = SimCLRAugment(min_scale=0.6, flip=0.0, jitter_probability=0.0, grayscale=0.0)
    few = train.subset(torch.arange(300))
    recipe = Supervised(steps=150, batch_size=64, lr=2e-3, augment=ShiftFlip(padding=1, flip=0.0))
    encoder = Fast(width=8, input_size=16).build(Seed(0))
    fit(recipe.learner(encoder, few, Seed(0)), few, recipe, Seed(0), label="t")
    encoder.module.eval()
    teacher = Linear().fit(encoder, few, Seed(0))
    distil = Distil(steps=150, batch_size=64, lr=4e-3, augment=augment)
    unlabelled = train.without_labels("distil")
    student = dataclasses.replace(distil, student=SMALL).distil(teacher, unlabelled, Seed(0))
    itself = distil.distil(teacher, unlabelled, Seed(0))

    def accuracy(classifier) -> float:
        with torch.no_grad():
            return float((classifier(test.inputs.float() / 255).argmax(1) == test.labels).float().mean())

    best = accuracy(teacher)
    assert best > 0.9
    assert student.encoder.width == encoder.width // 2
    assert accuracy(student) > best - 0.05
    assert accuracy(itself) > best - 0.03
