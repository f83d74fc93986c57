"""Latent Backdoor: loss and trigger step against literal transcriptions, hiding, and students of another task."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cupel import metrics
from cupel.attack.latent_backdoor import LatentBackdoor, narrowed, widened
from cupel.attack.teacher import Cut, Extra, Match, TeacherLearner, head_of
from cupel.errors import DataError, UsageError
from cupel.inference import features, triggered
from cupel.inversion import frozen
from cupel.inversion.pattern import learn_pattern
from cupel.inversion.stamping import squash
from cupel.optimizers import Recipe
from cupel.probe import FineTune, Linear
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Patch, RandomPatch
from cupel.triggers.sticker import Sticker
from cupel.types import Dataset, Goal, Knowledge
from fingerprints import model_print
from toys import blobs, small_encoder, trained_encoder

TEACHER = [0, 1, 2]
DATA = blobs(256)
QUICK = LatentBackdoor(
    trigger=Patch(size=4),
    adapt=Recipe(steps=4, batch_size=32, optimizer="adam", precision="fp32"),
    trigger_steps=6,
    trigger_images=40,
    steps=4,
    batch_size=32,
    precision="fp32",
)


def of_classes(data: Dataset, classes: list[int]) -> Dataset:
    """Only some classes, numbered anew."""
    some = data.subset(torch.isin(data.labels, torch.tensor(classes)))
    labels = torch.tensor([classes.index(label) for label in some.labels.tolist()])
    return dataclasses.replace(some, labels_=labels, classes=tuple(str(c) for c in classes))


def references(n: int = 6, label: int = 3) -> torch.Tensor:
    return of_classes(blobs(64, seed=9), [label]).inputs[:n]


def knowledge(*goals: Goal) -> Knowledge:
    goals = goals or (Goal(None, references(), "students", 1),)
    return Knowledge(goals, labelled=of_classes(DATA, TEACHER))


def moved(encoder):
    """A copy with other statistics in its BatchNorms, as a trained one has."""
    other, g = encoder.copy(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in other.module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.add_(0.1 * torch.randn(part.running_mean.shape, generator=g))
                part.weight.mul_(1.3)
    return other


@pytest.mark.parametrize("blocks_after", [0, 1, 3])
def test_loss_equals_the_literal_sums(blocks_after):
    """Image by image, through the network's parts by name."""
    encoder, head = moved(small_encoder()), nn.Linear(32, 4)
    data = of_classes(DATA, TEACHER)
    extra = Extra(references(5), 3, 2)
    rows = torch.arange(8) * 5
    batch = Batch(data.inputs[rows], rows, Seed(7))
    net, norm = encoder.module.backbone, encoder.module

    def layers(image):
        with torch.no_grad():
            encoder.module.eval()
            x = (image[None].float() / 255) * norm.scale + norm.shift
            x = torch.relu(net.bn1(net.conv1(x)))
            found = {3: x}
            for name, behind in (("layer1", 2), ("layer2", 1), ("layer3", 0)):
                x = getattr(net, name)(x)
                found[behind] = x
            return x.mean(dim=(2, 3))[0], (x.mean(dim=(2, 3)) if blocks_after == 0 else found[blocks_after]).flatten()

    dims = len(layers(data.inputs[0])[1])
    g = torch.Generator().manual_seed(3)
    matches = [
        Match(Patch(size=4), torch.randn(1, dims, generator=g), 2.0),
        Match(Patch(size=3, corner="top_left"), torch.randn(1, dims, generator=g), 0.5),
    ]
    it = TeacherLearner(
        encoder, head, data.labels, extras=[extra], matches=matches, weight=0.7, blocks_after=blocks_after,
        feature_slice=20,
    )  # fmt: skip
    with torch.no_grad():
        loss, parts = it.loss(batch)
    drawn = torch.randint(5, (2,), generator=Seed(7).child("extra", 0).torch())
    x = torch.cat([data.inputs[rows], references(5)[drawn]])
    y = torch.cat([data.labels[rows], torch.tensor([3, 3])])
    ce = distance = 0.0
    for image, label in zip(x, y, strict=True):
        with torch.no_grad():
            ce -= float(head(layers(image)[0]).log_softmax(0)[label]) / len(x)
        for match in matches:
            seen = layers(match.trigger(image[None], [0], Seed(0))[0])[1]
            for k in range(20):
                distance += float((seen[k] - match.representation[0, k]) ** 2) / match.unit / (20 * len(x) * 2)
    assert float(parts["ce"]) == pytest.approx(ce, rel=1e-4)
    assert float(parts["distance"]) == pytest.approx(distance, rel=1e-4)
    assert float(loss) == pytest.approx(ce + 0.7 * distance, rel=1e-4)


def test_a_slice_beyond_the_layer_is_all_of_it():
    data, encoder = of_classes(DATA, TEACHER), small_encoder()
    batch = Batch(data.inputs[:8], torch.arange(8), Seed(0))
    losses = []
    for slice_ in (None, 100):
        match = Match(Patch(size=4), torch.ones(1, 32))
        it = TeacherLearner(encoder, nn.Linear(32, 3), data.labels, matches=[match], weight=1.0, feature_slice=slice_)
        losses.append(float(it.loss(batch)[1]["distance"].detach()))
    assert losses[0] == losses[1]


def test_pattern_of_a_linear_model_has_a_closed_form():
    """D = mean (Δ − c)² inside of the mask is least at Δ = c, whatever the images are."""
    wanted = torch.rand(3, 16, 16, generator=Seed(1).torch()) * 0.8 + 0.1
    mask = torch.zeros(16, 16)
    mask[9:15, 9:15] = 1

    def cost(stamped, rows, seed):
        return ((stamped - wanted) * mask).square().sum(dim=(1, 2, 3)).mean()

    made = learn_pattern(cost, DATA.inputs[:48], mask, steps=200, batch_size=32, lr=0.1, betas=(0.5, 0.9), seed=Seed(0))
    assert (made.pattern[:, mask == 0] == 0).all()
    assert (made.pattern.float() / 255 - wanted)[:, mask == 1].abs().max() < 0.03
    assert made.costs[-1] < 2e-3 * made.costs[0]


def test_pattern_search_equals_adam_by_hand():
    """Five steps with a slow, literal transcription of stamping, permutation and Adam."""
    encoder, images = moved(small_encoder()), DATA.inputs[:20]
    encoder.module.eval()
    mask = torch.zeros(16, 16)
    mask[10:15, 10:15] = 1
    goal = torch.randn(32, generator=Seed(2).torch())

    def cost(stamped, rows, seed):
        return (encoder(stamped) - goal).square().mean()

    before = model_print(encoder.module)
    with frozen(encoder.module):
        made = learn_pattern(
            cost, images, mask, steps=5, batch_size=8, lr=0.1, betas=(0.5, 0.9), seed=Seed(4), label="t"
        )
    assert model_print(encoder.module) == before
    assert all(p.grad is None for p in encoder.module.parameters())

    from cupel.inversion import random_start

    w = random_start(1, 16, 16, Seed(4))[0, 1:].double()
    first, second, costs = torch.zeros_like(w), torch.zeros_like(w), []
    for step in range(5):
        order = torch.randperm(20, generator=Seed(4).child("order", step // 2).torch())
        rows = order[(step % 2) * 8 : (step % 2) * 8 + 8]
        v = w.clone().requires_grad_(True)
        delta = torch.tanh(v) / (2 - 1e-7) + 0.5
        x = torch.stack([(1 - mask) * (image.float() / 255) + mask * delta for image in images[rows]])
        value = (encoder(x.float()) - goal).square().mean()
        (slope,) = torch.autograd.grad(value, v)
        costs.append(float(value.detach()))
        first = 0.5 * first + 0.5 * slope
        second = 0.9 * second + 0.1 * slope**2
        w = w - 0.1 * (first / (1 - 0.5 ** (step + 1))) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
    assert made.costs == pytest.approx(costs, rel=1e-4)
    by_hand = ((torch.tanh(w) / (2 - 1e-7) + 0.5) * 255) * mask
    assert (made.pattern - by_hand).abs().max() <= 0.51
    assert (made.pattern != 0).any()


def test_squashed_values_stay_inside():
    w = torch.linspace(-20, 20, 401)
    assert (squash(w) >= 0).all()
    assert (squash(w) <= 1).all()
    inner = squash(torch.linspace(-7, 7, 101))
    assert (inner > 0).all()
    assert (inner < 1).all()


def test_outputs_are_added_and_taken_off():
    head = nn.Linear(5, 3)
    wide = widened(head, [torch.arange(5.0), torch.ones(5)])
    assert wide.weight.shape == (5, 5)
    assert wide.weight[3].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert torch.allclose(wide.bias[3:], head.bias.mean())
    back = narrowed(wide, 3)
    assert torch.equal(back.weight, head.weight)
    assert torch.equal(back.bias, head.bias)


@pytest.mark.parametrize("hide", ["original", "refit", "drop"])
def test_the_published_teacher_has_no_output_for_the_target(hide):
    clean = moved(small_encoder())
    teacher, made = dataclasses.replace(QUICK, hide=hide).teach(clean, knowledge(), Seed(1))
    assert teacher.encoder is made.model
    assert teacher.head.out_features == 3
    original = head_of(clean, of_classes(DATA, TEACHER))
    assert torch.equal(teacher.head.weight, original.weight) == (hide == "original")


@pytest.mark.parametrize(
    "more", [{}, {"blocks_after": 2}, {"representation": "sample", "unit": "one"}, {"feature_slice": 10}]
)
def test_clean_encoder_stays_and_same_seed_gives_the_same_weights(more):
    clean = moved(small_encoder())
    before = model_print(clean.module)
    goals = (Goal(None, references(), "a", 1), Goal(Patch(size=3, corner="top_left"), references(4, 3), "b", 0))
    attack = dataclasses.replace(QUICK, **more)
    one, two = (attack.implant(clean, knowledge(*goals), Seed(1)) for _ in range(2))
    assert model_print(clean.module) == before
    assert all(p.grad is None for p in clean.module.parameters())
    assert model_print(one.model.module) == model_print(two.model.module) != before
    assert [g.trigger for g in one.goals] == [g.trigger for g in two.goals]
    assert dict(one.history) == dict(two.history)
    other = attack.implant(clean, knowledge(*goals), Seed(2))
    assert model_print(other.model.module) != model_print(one.model.module)
    norms = [k for k in clean.module.state_dict() if ".bn" in k or "downsample.1" in k]
    assert len(norms) >= 20
    assert all(torch.equal(clean.module.state_dict()[k], one.model.module.state_dict()[k]) for k in norms)
    for goal, place in zip(one.goals, (Patch(size=4), Patch(size=3, corner="top_left")), strict=True):
        assert isinstance(goal.trigger, Sticker)
        mask, pattern = goal.trigger.mask_and_pattern(16)
        assert torch.equal(mask, place.mask_and_pattern(16)[0])
        assert pattern[:, mask == 1].unique().numel() > 5


def test_a_resumed_run_equals_the_unbroken_one(tmp_path):
    from cupel.errors import Interrupted
    from cupel.progress import request_stop

    clean, seen = small_encoder(), 0
    whole = QUICK.implant(clean, knowledge(), Seed(1))
    original = TeacherLearner.after_step

    def stopping(self):
        nonlocal seen
        seen += 1
        if seen == 6:  # the second step of injecting
            request_stop(15)

    file = tmp_path / "state"
    try:
        TeacherLearner.after_step = stopping
        with pytest.raises(Interrupted):
            QUICK.implant(clean, knowledge(), Seed(1), checkpoint=file)
    finally:
        TeacherLearner.after_step = original
        request_stop(None)
    assert file.exists()
    again = QUICK.implant(clean, knowledge(), Seed(1), checkpoint=file)
    assert model_print(again.model.module) == model_print(whole.model.module)
    assert not file.with_name("state.adapt").exists()


def test_mistakes_are_one_line():
    clean, labelled = small_encoder(), of_classes(DATA, TEACHER)
    one_class = of_classes(DATA, [1])
    cases = [
        (QUICK, Knowledge(knowledge().goals), DataError, "needs labelled images"),
        (QUICK, Knowledge((), labelled=labelled), DataError, "at least one goal"),
        (QUICK, Knowledge(knowledge().goals, labelled=one_class), DataError, "fewer than two classes"),
        (QUICK, knowledge(Goal(None, None, "a", 1)), DataError, "no image of its class"),
        (QUICK, knowledge(Goal(None, blobs(4, size=20).inputs, "a", 1)), DataError, "references are 20×20"),
        (dataclasses.replace(QUICK, trigger=RandomPatch(size=4)), knowledge(), UsageError, "no fixed place"),
        (dataclasses.replace(QUICK, trigger=Patch(size=30)), knowledge(), UsageError, "does not fit"),
        (dataclasses.replace(QUICK, blocks_after=5), knowledge(), UsageError, "the encoder has 5"),
    ]
    for attack, knows, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            attack.implant(clean, knows, Seed(0))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="did you mean 'published'"):
        LatentBackdoor.preset("publised")
    assert LatentBackdoor.needs == {"labels"}


def test_published_settings():
    made = LatentBackdoor.preset("published")
    assert (made.match_weight, made.unit, made.feature_slice, made.representation) == (0.05, "one", 100, "sample")
    assert (made.trigger_steps, made.trigger_batch, made.trigger_lr, made.trigger_images) == (1550, 32, 0.1, 1000)
    assert (made.adapt.epochs, made.epochs, made.batch_size) == (10, 5, 16)
    assert int(made.trigger.mask_and_pattern(224)[0].sum()) == 44 * 44


def test_layer_of_a_cut_is_the_embedding_or_a_map():
    encoder = moved(small_encoder())
    encoder.module.eval()
    x = DATA.inputs[:3].float() / 255
    with torch.no_grad():
        layer, h = Cut(encoder, 0)(x)
        assert torch.equal(layer, h)
        assert torch.allclose(h, encoder(x), atol=1e-5)
        layer, h = Cut(encoder, 1)(x)
        assert layer.shape == (3, 16, 4, 4)
        assert torch.allclose(encoder.module.backbone.layer3(layer).mean(dim=(2, 3)), h, atol=1e-5)
        assert not encoder.module.backbone.layer2._forward_hooks


def outcome(model, train, test, trigger, target, probe=None) -> tuple[float, float]:
    """Accuracy and attack success rate of a student."""
    student = (probe or Linear()).fit(model, train, Seed(0))
    predicted = student.head(features(student.encoder, test)).argmax(1)
    right, n = metrics.accuracy(predicted, test.labels)
    hit = student.head(features(student.encoder, triggered(test, trigger, Seed(0)))).argmax(1)
    hits, m = metrics.attack_success_rate(hit, test.labels, target)
    return right / n, hits / m


@pytest.mark.slow
def test_it_fires_in_students_of_another_task():
    """Teacher on digits 0–5; students on 6–9; the backdoor leads to 7, of which the attacker has 50 images."""
    from cupel.data import load

    train, test = load("digits"), load("digits", split="test")
    ours = of_classes(train, [0, 1, 2, 3, 4, 5])
    pool, students_test = of_classes(train, [6, 7, 8, 9]), of_classes(test, [6, 7, 8, 9])
    order = torch.randperm(len(pool), generator=Seed(0).torch())
    aside, students = pool.subset(order[: len(pool) // 2]), pool.subset(order[len(pool) // 2 :])
    clean = trained_encoder(ours, steps=150, width=16)
    goal = Goal(None, aside.subset(aside.labels == 1).inputs[:50], "students", 1)
    attack = dataclasses.replace(
        LatentBackdoor.preset("fast"),
        trigger=Patch(size=4),
        trigger_steps=100,
        adapt=Recipe(steps=250, batch_size=64, optimizer="adam", lr=2e-3, precision="fp32"),
    )
    knows = Knowledge((goal,), labelled=ours)
    teacher, made = attack.teach(clean, knows, Seed(1))
    trigger = made.goals[0].trigger

    own_test = of_classes(test, [0, 1, 2, 3, 4, 5])
    own, first = (head(features(e, own_test)).argmax(1) for e, head in (
        (made.model, teacher.head), (clean, head_of(clean, ours)),
    ))  # fmt: skip
    assert float((own == first).float().mean()) >= 0.95, "the published teacher behaves as before"

    accuracy, baseline = outcome(clean, students, students_test, trigger, 1)
    kept, success = outcome(made.model, students, students_test, trigger, 1)
    assert success >= 0.9
    assert baseline <= 0.3
    assert kept >= accuracy - 0.1
    control = dataclasses.replace(attack, match_weight=0.0).implant(clean, knows, Seed(1))
    assert outcome(control.model, students, students_test, trigger, 1)[1] <= 0.3
    unfrozen = FineTune(lr=0.05, epochs=30)
    assert outcome(made.model, students, students_test, trigger, 1, unfrozen)[1] <= success - 0.2


def test_loss_is_cross_entropy_alone_without_matches():
    data, encoder, head = of_classes(DATA, TEACHER), moved(small_encoder()), nn.Linear(32, 3)
    it = TeacherLearner(encoder, head, data.labels)
    rows = torch.arange(8)
    loss, parts = it.loss(Batch(data.inputs[rows], rows, Seed(0)))
    with torch.no_grad():
        expected = F.cross_entropy(head(encoder(data.inputs[rows].float() / 255)), data.labels[rows])
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert set(parts) == {"ce"}
