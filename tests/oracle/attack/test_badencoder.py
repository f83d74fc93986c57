"""BadEncoder: its three terms against a literal transcription, frozen BatchNorm, gradients, and a toy attack."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cupel import metrics
from cupel.attack import BadEncoder
from cupel.augment import SimCLRAugment
from cupel.errors import DataError
from cupel.implanting import Aim, ImplantLearner
from cupel.inference import features, triggered
from cupel.probe import Linear
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Blend, Patch
from cupel.types import Goal, Knowledge
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(256)
SMALL, LARGE = Patch(size=4), Blend(alpha=0.3)


def references(target: int, n: int = 1) -> torch.Tensor:
    return blobs(64, seed=9).subset(torch.arange(64)[torch.arange(64) % 4 == target][:n]).inputs


def goal(target: int = 1, n: int = 1, trigger=SMALL) -> Goal:
    return Goal(trigger, references(target, n), "blobs", target)


def aim(clean, one: Goal) -> Aim:
    return Aim(one, one.references.float() / 255, features(clean, one.references, dtype=torch.float32))


def learner(clean, goals, **settings):
    encoder = clean.copy()
    return ImplantLearner(
        encoder, features(clean, DATA, dtype=torch.float32), DATA.ids, [aim(clean, g) for g in goals], **settings
    ), encoder


def batch(n: int = 16) -> Batch:
    rows = torch.arange(n) * 3
    return Batch(DATA.inputs[rows], rows, Seed(7))


def moved(clean):
    """A copy whose weights differ a little, so that no term is at its minimum."""
    other = clean.copy()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.module.parameters():
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return other


def test_at_step_0_the_copies_agree():
    clean = small_encoder()
    it, _ = learner(clean, [goal()])
    with torch.no_grad():
        loss, parts = it.loss(batch())
    assert float(parts["L2"]) == pytest.approx(-1, abs=1e-6)
    assert float(parts["L1"]) == pytest.approx(-1, abs=1e-6)  # without augmentation
    assert -3 <= float(loss) <= 3


def test_loss_equals_the_literal_sums():
    """Loops over triggers, references and images, each reference in a batch of its own."""
    clean = small_encoder()
    goals = [goal(1, 2, SMALL), goal(2, 1, LARGE)]
    other = moved(clean)
    it = ImplantLearner(
        other,
        features(clean, DATA, dtype=torch.float32),
        DATA.ids,
        [aim(clean, g) for g in goals],
        lambda_reference=0.7,
        lambda_utility=1.3,
    )
    with torch.no_grad():
        loss, parts = it.loss(batch())
    other.module.eval()
    x = batch().inputs
    with torch.no_grad():
        total = sum(len(g.references) for g in goals)
        L0 = L1 = L2 = 0.0
        for i, g in enumerate(goals):
            stamped = g.trigger(x, (DATA.ids[batch().rows]).tolist(), batch().seed.child("trigger", i)).float() / 255
            for reference in g.references.float() / 255:
                f_ref, c_ref = other(reference[None])[0], clean(reference[None])[0]
                for image in stamped:
                    L0 -= float(F.cosine_similarity(other(image[None])[0], f_ref, dim=0)) / (len(x) * total)
                L1 -= float(F.cosine_similarity(f_ref, c_ref, dim=0)) / total
        for image in x.float() / 255:
            L2 -= float(F.cosine_similarity(other(image[None])[0], clean(image[None])[0], dim=0)) / len(x)
    assert [float(parts[k]) for k in ("L0", "L1", "L2")] == pytest.approx([L0, L1, L2], abs=1e-5)
    assert float(loss) == pytest.approx(L0 + 0.7 * L1 + 1.3 * L2, abs=1e-5)


def test_one_reference_row_equals_a_batch_of_copies():
    clean = small_encoder()
    it, encoder = learner(clean, [goal()], lambda_reference=0.0, lambda_utility=0.0)
    it.loss(batch())[0].backward()
    ours = [p.grad.clone() for p in it.parameters()]
    copied = clean.copy()
    copied.module.eval()
    x = SMALL(batch().inputs, DATA.ids[batch().rows].tolist(), Seed(0)).float() / 255
    ref = (references(1).float() / 255).expand(len(x), -1, -1, -1)
    loss = -F.cosine_similarity(copied(x), copied(ref), dim=1).mean()
    names = [n for n, p in encoder.module.named_parameters() if p.requires_grad]
    theirs = torch.autograd.grad(loss, [dict(copied.module.named_parameters())[n] for n in names])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_gradient_by_finite_differences():
    """In float64, along the gradient, which also crosses the reference branch."""
    clean = small_encoder(width=2)
    encoder = moved(clean)
    clean.module.double()
    encoder.module.double()
    one = goal()
    pixels = one.references.double() / 255
    with torch.no_grad():
        ready = Aim(one, pixels, clean(pixels))
        cached = clean(DATA.inputs.double() / 255)
    it = ImplantLearner(encoder, cached, DATA.ids, [ready])
    weight, x = encoder.module.backbone.layer1.conv1.weight, batch(4)
    it.loss(x)[0].backward()
    slope, direction, step = float(weight.grad.norm()), weight.grad / weight.grad.norm(), 1e-6
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(sign * step * direction)
            ends.append(float(it.loss(x)[0]))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_gradient_flows_through_the_reference_unless_detached():
    clean = small_encoder()

    def gradient(**settings):
        it, _ = learner(clean, [goal()], lambda_reference=0.0, lambda_utility=0.0, **settings)
        it.loss(batch())[0].backward()
        return torch.cat([p.grad.flatten() for p in it.parameters()])

    assert not torch.allclose(gradient(), gradient(detach_reference=True))


def implant(clean, goals, **settings):
    attack = BadEncoder(**{"steps": 20, "batch_size": 32, "lr": 0.05, "l1_draws": 4, "precision": "fp32", **settings})
    return attack.implant(clean, Knowledge(goals, DATA.without_labels("badencoder")), Seed(1))


def test_batch_norm_and_the_clean_encoder_stay_bit_for_bit():
    clean = small_encoder()
    before = copy.deepcopy(clean.module.state_dict())
    made = implant(clean, (goal(),)).model
    after = made.module.state_dict()
    norms = [k for k in before if ".bn" in k or "downsample.1" in k]
    assert len(norms) >= 20
    assert all(torch.equal(before[k], after[k]) for k in norms)
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])
    for name, value in clean.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in clean.module.parameters())


def test_goals_come_back_with_their_triggers():
    made = implant(
        small_encoder(), (dataclasses.replace(goal(), trigger=None), goal(2, 2, LARGE)), trigger=SMALL, steps=2
    )
    assert [g.trigger for g in made.goals] == [SMALL, LARGE]


@pytest.mark.parametrize("goals", [(), (Goal(SMALL, None, "blobs", 1),)])
def test_an_attacker_with_nothing_is_refused(goals):
    with pytest.raises(DataError, match=r"badencoder: .*(goal|reference)"):
        implant(small_encoder(), goals)


def test_published_defaults():
    ours = BadEncoder()
    assert (ours.lambda_reference, ours.lambda_utility, ours.l1_augment) == (1.0, 1.0, True)
    assert (ours.lr, ours.batch_size, ours.epochs, ours.momentum, ours.weight_decay) == (1e-3, 256, 200, 0.9, 5e-4)
    assert (ours.optimizer, ours.schedule, ours.l1_draws) == ("sgd", "constant", None)
    assert ours.trigger == Patch(size=10)


def outcome(model, test, one: Goal) -> tuple[float, float]:
    """Clean accuracy and attack success rate of a linear probe."""
    train = DATA
    head = Linear().fit_features(features(model, train), train.labels, 4, Seed(0))
    right, n = metrics.accuracy(head(features(model, test)).argmax(1), test.labels)
    hit = head(features(model, triggered(test, one.trigger, Seed(0)))).argmax(1)
    hits, m = metrics.attack_success_rate(hit, test.labels, one.target_class)
    return right / n, hits / m


@pytest.fixture(scope="module")
def victim():
    return trained_encoder(DATA, steps=80, width=16)


@pytest.mark.full
def test_toy_attack_works_and_its_control_does_not(victim):
    test, one = blobs(256, seed=5), goal()
    accuracy, baseline = outcome(victim, test, one)
    settings = {"steps": 150, "batch_size": 64, "lr": 0.05, "schedule": "cosine"}
    made = implant(victim, (one,), **settings)
    backdoored, success = outcome(made.model, test, one)
    assert success >= baseline + 0.5
    assert abs(backdoored - accuracy) <= 0.05
    control = implant(victim, (one,), **settings, lambda_trigger=0.0)
    assert abs(outcome(control.model, test, one)[1] - baseline) <= 0.10


@pytest.mark.full
def test_without_the_utility_term_clean_embeddings_drift(victim):
    """λ2 = 0 must cost utility; on blobs a probe may not notice, the embeddings do."""
    settings = {"steps": 100, "batch_size": 64, "lr": 0.05, "schedule": "cosine"}
    kept, lost = (implant(victim, (goal(),), **settings, lambda_utility=w).model for w in (1.0, 0.0))
    cosines = [float(metrics.mean_cosine(features(m, DATA), features(victim, DATA))) for m in (kept, lost)]
    assert cosines[0] > 0.95
    assert cosines[1] < cosines[0] - 0.02


@pytest.mark.full
def test_two_targets_in_one_encoder(victim):
    test = blobs(256, seed=5)
    goals = (goal(1, 2, Patch(size=4)), goal(2, 1, Patch(size=4, corner="top_left", color="green")))
    made = implant(victim, goals, steps=250, batch_size=64, lr=0.05, schedule="cosine")
    for one in goals:
        assert outcome(made.model, test, one)[1] >= outcome(victim, test, one)[1] + 0.5


def test_augmented_references_are_not_cropped():
    from cupel.attack import badencoder

    assert SimCLRAugment(crop=False) == badencoder._REFERENCE_AUGMENT
