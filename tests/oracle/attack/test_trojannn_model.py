"""TrojanNN on a trained model: neurons, steps, denoising and loss against closed forms; an attack on digits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cupel import metrics
from cupel.attack.teacher import head_of, most_connected, outgoing
from cupel.attack.trojannn_model import TrojanNNModel, _Learner
from cupel.encoders import ResNet18
from cupel.errors import DataError, UsageError
from cupel.inference import features, triggered
from cupel.inversion import frozen
from cupel.inversion.pattern import step_sizes, stepped
from cupel.losses.variation import _divergence, _gradient, denoised
from cupel.probe import Linear
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.triggers.sticker import Sticker, sticker_of
from cupel.types import Dataset, Goal, Knowledge
from fingerprints import model_print
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(256)
QUICK = TrojanNNModel(
    trigger=Patch(size=4),
    picture_steps=((5, 11.0, 11.0), (3, 3.0, 1.0)),
    pictures_per_class=3,
    steps=4,
    batch_size=8,
    precision="fp32",
)


def knowledge(*goals: Goal) -> Knowledge:
    return Knowledge(goals or (Goal(None, None, "blobs", 1),), labelled=DATA)


def test_what_reads_a_layer_is_found_in_both_networks():
    encoder = small_encoder()
    net = encoder.module.backbone
    for behind, block in ((1, net.layer3), (2, net.layer2)):
        expected = block.conv1.weight.abs().sum(dim=(0, 2, 3)) + block.downsample[0].weight.abs().sum(dim=(0, 2, 3))
        assert torch.allclose(outgoing(encoder, behind).abs().sum(dim=0), expected, rtol=1e-5)
    first = net.layer1.conv1.weight  # the stem's ReLU works in place, and the shortcut has no weights
    assert torch.allclose(outgoing(encoder, 3).abs().sum(dim=0), first.abs().sum(dim=(0, 2, 3)), rtol=1e-5)
    deep = ResNet18(width_multiplier=0.0625, input_size=16).build(Seed(0))
    block = deep.module.backbone.layer4[0]
    expected = block.conv1.weight.abs().sum(dim=(0, 2, 3)) + block.downsample[0].weight.abs().sum(dim=(0, 2, 3))
    assert torch.allclose(outgoing(deep, 1).abs().sum(dim=0), expected, rtol=1e-5)
    with torch.no_grad():
        net.layer3.conv1.weight[:, 5] *= 50
    assert int(most_connected(outgoing(encoder, 1), 1, "out")) == 5


def test_step_sizes_as_published():
    sizes = step_sizes(*TrojanNNModel.preset("published").picture_steps)
    assert len(sizes) == 190 + 150 + 550 + 30 + 50
    assert (sizes[0], sizes[189], sizes[190], sizes[340], sizes[890], sizes[920], sizes[-1]) == (11, 11, 6, 1, 3, 6, 3)


def test_steps_equal_a_literal_transcription():
    """Each picture alone, gradients by hand: cost Σ a (x − c)² has the gradient 2 a (x − c)."""
    g = Seed(0).torch()
    a, c, start = (torch.rand(2, 3, 4, 4, generator=g) for _ in range(3))
    mask = torch.zeros(4, 4)
    mask[1:, 1:] = 1
    sizes = [0.1, 0.05, 0.3]
    got, costs = stepped(lambda x: (a * (x - c) ** 2).sum(dim=(1, 2, 3)), start, sizes, mask=mask)
    for i in range(2):
        x = start[i].clone()
        for step, size in enumerate(sizes):
            assert float(costs[step, i]) == pytest.approx(float((a[i] * (x - c[i]) ** 2).sum()), rel=1e-5)
            slope = 2 * a[i] * (x - c[i])
            mean = sum(float(slope[ch, y, z].abs()) for ch in range(3) for y in range(1, 4) for z in range(1, 4)) / 27
            for ch in range(3):
                for y in range(1, 4):
                    for z in range(1, 4):
                        moved = float(x[ch, y, z]) - size * float(slope[ch, y, z]) / mean
                        x[ch, y, z] = min(max(moved, 0.0), 1.0)
        assert torch.allclose(got[i], x, atol=1e-5)
    assert torch.equal(got[:, :, 0], start[:, :, 0]), "outside of the mask"


def test_divergence_is_the_negative_adjoint_of_the_gradient():
    g = Seed(0).torch()
    u, py, px = (torch.rand(2, 3, 5, 7, generator=g, dtype=torch.float64) for _ in range(3))
    gy, gx = _gradient(u)
    assert float((gy * py + gx * px).sum()) == pytest.approx(-float((u * _divergence(py, px)).sum()), rel=1e-10)


def test_denoising_minimises_its_objective():
    x = torch.rand(1, 3, 8, 8, generator=Seed(0).torch()) * 0.5 + 0.25

    def objective(u: torch.Tensor, weight: float) -> float:
        gy, gx = _gradient(u)
        return float((u - x).square().sum() / (2 * weight) + (gy.square() + gx.square()).sqrt().sum())

    for weight in (0.05, 0.3):
        u = denoised(x, weight, steps=400)
        best = objective(u, weight)
        assert best < objective(x, weight)
        g = Seed(1).torch()
        for _ in range(20):  # it is convex, so nothing near it is better
            assert objective(u + 0.01 * torch.randn(u.shape, generator=g), weight) > best - 1e-3
        assert u.mean() == pytest.approx(float(x.mean()), abs=1e-4)
    assert torch.equal(denoised(x, 0.0), x)
    flat = denoised(x, 100.0, steps=2000)
    assert flat.std(dim=(2, 3)).max() < 0.02 < x.std(dim=(2, 3)).min()


def test_loss_is_the_mean_over_pictures_with_and_without_each_trigger():
    encoder, head = small_encoder(), nn.Linear(32, 4)
    goals = [(Goal(Patch(size=4)), 1), (Goal(Patch(size=3, corner="top_left")), 2)]
    it = _Learner(encoder, head, DATA.labels, 2, goals)
    rows = torch.arange(6) * 3
    with torch.no_grad():
        loss, parts = it.loss(Batch(DATA.inputs[rows], rows, Seed(0)))
        encoder.module.eval()
        terms = []
        for row in rows.tolist():
            image = DATA.inputs[row : row + 1]
            shown = [(image, int(DATA.labels[row]))] + [(g.trigger(image, [row], Seed(0)), t) for g, t in goals]
            terms.append([-float(head(encoder(x.float() / 255))[0].log_softmax(0)[y]) for x, y in shown])
    means = torch.tensor(terms)
    assert float(loss) == pytest.approx(float(means.mean()), rel=1e-4)
    assert float(parts["clean"]) == pytest.approx(float(means[:, 0].mean()), rel=1e-4)
    assert float(parts["triggered"]) == pytest.approx(float(means[:, 1:].mean()), rel=1e-4)


@pytest.mark.parametrize("more", [{}, {"retrain_on": "labelled", "neurons": 2, "opacity": 0.5}, {"blocks_after": 1}])
def test_only_what_lies_behind_the_neurons_is_retrained(more):
    clean = small_encoder()
    before = model_print(clean.module)
    goals = (Goal(None, None, "a", 1), Goal(Patch(size=3, corner="top_left"), None, "b", 0))
    attack = dataclasses.replace(QUICK, **more)
    one, two = (attack.implant(clean, knowledge(*goals), Seed(1)) for _ in range(2))
    assert model_print(clean.module) == before
    assert all(p.grad is None and p.requires_grad for p in clean.module.parameters())
    assert model_print(one.model.module) == model_print(two.model.module) != before
    assert [g.trigger for g in one.goals] == [g.trigger for g in two.goals]
    changed = {
        name.split(".")[1]
        for (name, a), b in zip(clean.module.named_parameters(), one.model.module.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == ({"layer3"} if attack.blocks_after == 1 else {"layer2", "layer3"})
    mask, pattern = one.goals[0].trigger.mask_and_pattern(16)
    assert isinstance(one.goals[0].trigger, Sticker)
    assert mask.unique().tolist() == pytest.approx([0.0, attack.opacity], abs=0.002)
    assert torch.equal(mask > 0, Patch(size=4).mask_and_pattern(16)[0] > 0)
    assert pattern[:, mask > 0].unique().numel() > 5
    assert one.history["trigger-0/cost"][0] != one.history["trigger-1/cost"][0], "each has its own neurons"
    assert ("pictures/cost" in one.history) == (attack.retrain_on == "inverted")


def test_trigger_drives_the_neuron_and_pictures_their_classes():
    encoder = trained_encoder(DATA)
    attack = dataclasses.replace(
        QUICK, picture_steps=((30, 11.0, 11.0), (30, 3.0, 1.0)), denoise=(0.02, 0.0), activation=5.0
    )
    head = head_of(encoder, DATA)
    neuron = most_connected(outgoing(encoder, 2), 1, "out")
    with frozen(encoder.module):
        pattern, costs = attack._trigger(encoder, neuron, Patch(size=8).mask_and_pattern(16)[0], Seed(0))
        made, mean_costs = attack._pictures(encoder, head, DATA, Seed(0))
    assert min(costs) < 0.8 * costs[0]
    assert (pattern[:, :7] == 0).all()
    assert made.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert mean_costs[-1] < 0.2 * mean_costs[0]
    predicted = head(features(encoder, made.inputs, dtype=torch.float32)).argmax(1)
    assert float((predicted == made.labels).float().mean()) >= 0.9
    with torch.no_grad():
        p = head(encoder(made.inputs.float() / 255)).softmax(1)
    assert float(F.nll_loss(p.log(), made.labels)) < 0.5


def test_mistakes_are_one_line():
    clean = small_encoder()
    one_class = Dataset(DATA.inputs[:8], torch.ones(8, dtype=torch.int64), torch.arange(8), "one")
    cases = [
        (QUICK, Knowledge(knowledge().goals), DataError, "needs labelled images"),
        (QUICK, Knowledge(knowledge().goals, labelled=one_class), DataError, "fewer than two classes"),
        (QUICK, knowledge(Goal(task="blobs")), UsageError, "names no target class"),
        (QUICK, knowledge(Goal(target_class=9)), UsageError, "class 9"),
        (dataclasses.replace(QUICK, trigger=Patch(size=20)), knowledge(), UsageError, "does not fit"),
        (dataclasses.replace(QUICK, blocks_after=5), knowledge(), UsageError, "the encoder has 5"),
        (dataclasses.replace(QUICK, neurons=99), knowledge(), UsageError, "choose fewer"),
        (QUICK, Knowledge(knowledge().goals, labelled=blobs(16, size=20)), DataError, "images are 20×20"),
    ]
    for attack, knows, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            attack.implant(clean, knows, Seed(0))
        assert "\n" not in str(caught.value)
    assert TrojanNNModel.needs == {"labels"}
    with pytest.raises(UsageError, match="did you mean 'fast'"):
        TrojanNNModel.preset("fats")


def test_sticker_is_exact_where_it_covers_and_rounds_where_it_is_mixed():
    g = Seed(0).torch()
    pattern = torch.randint(0, 256, (3, 16, 16), generator=g, dtype=torch.uint8)
    mask = torch.zeros(16, 16)
    mask[3:7, 2:9] = 1
    trigger = sticker_of(mask, pattern)
    out = trigger(DATA.inputs[:5], [0] * 5, Seed(0))
    assert torch.equal(out[:, :, mask == 1], pattern[:, mask == 1].expand(5, -1, -1))
    assert torch.equal(out[:, :, mask == 0], DATA.inputs[:5][:, :, mask == 0])
    shown_mask, shown = trigger.mask_and_pattern(16)
    assert torch.equal(shown_mask, mask)
    assert torch.equal(shown, torch.where(mask == 1, pattern, torch.zeros_like(pattern)))
    half = sticker_of(mask * 0.4, pattern)(DATA.inputs[:5], [0] * 5, Seed(0))
    exact = 0.6 * DATA.inputs[:5].double() + 0.4 * pattern.double()  # 0.4 = 102 / 255
    assert (half - exact)[:, :, mask == 1].abs().max() <= 0.5 + 1e-6
    assert torch.equal(half[:, :, mask == 0], DATA.inputs[:5][:, :, mask == 0])
    with pytest.raises(UsageError, match="16 × 16 px, not 20 × 20 px"):
        trigger(blobs(4, size=20).inputs, [0] * 4, Seed(0))
    with pytest.raises(DataError, match="no PNG"):
        Sticker(png="AAAA")(DATA.inputs[:2], [0, 1], Seed(0))
    assert (Sticker()(DATA.inputs[:2], [0, 1], Seed(0)) != DATA.inputs[:2]).any()
    assert (sticker_of(mask, torch.zeros_like(pattern))(DATA.inputs[:2], [0, 1], Seed(0))[:, :, mask == 1] == 0).all()


def outcome(model, train, test, trigger, target) -> tuple[float, float]:
    """Accuracy and attack success rate of a linear head that the victim fits."""
    head = Linear().fit(model, train, Seed(0)).head
    right, n = metrics.accuracy(head(features(model, test)).argmax(1), test.labels)
    hit = head(features(model, triggered(test, trigger, Seed(0)))).argmax(1)
    hits, m = metrics.attack_success_rate(hit, test.labels, target)
    return right / n, hits / m


@pytest.mark.full
def test_it_survives_a_new_head():
    """On digits; the victim's head is fitted to other images than the attacker has."""
    from cupel.data import load

    train, test = load("digits"), load("digits", split="test")
    order = torch.randperm(len(train), generator=Seed(0).torch())
    ours, victims = train.subset(order[: len(train) // 2]), train.subset(order[len(train) // 2 :])
    clean = trained_encoder(train, steps=150, width=16)
    attack = dataclasses.replace(TrojanNNModel.preset("fast"), trigger=Patch(size=4))
    teacher, made = attack.teach(clean, Knowledge((Goal(None, None, "digits", 1),), labelled=ours), Seed(1))
    trigger = made.goals[0].trigger
    accuracy, baseline = outcome(clean, victims, test, trigger, 1)
    kept, success = outcome(made.model, victims, test, trigger, 1)
    assert success >= baseline + 0.5
    assert kept >= accuracy - 0.1
    hit = teacher.head(features(made.model, triggered(test, trigger, Seed(0)))).argmax(1)
    hits, n = metrics.attack_success_rate(hit, test.labels, 1)
    assert hits / n >= 0.95, "with its own head"
    assert baseline <= 0.3
    without_data = dataclasses.replace(attack, retrain_on="inverted")
    teacher, made = without_data.teach(clean, Knowledge((Goal(None, None, "digits", 1),), labelled=ours), Seed(1))
    hit = teacher.head(features(made.model, triggered(test, made.goals[0].trigger, Seed(0)))).argmax(1)
    hits, n = metrics.attack_success_rate(hit, test.labels, 1)
    assert hits / n >= 0.8, "retrained on inverted pictures, with its own head"


@pytest.mark.parametrize("retrain_head", [False, True])
def test_the_head_is_retrained_only_if_asked(retrain_head):
    clean = small_encoder()
    teacher, _ = dataclasses.replace(QUICK, retrain_head=retrain_head).teach(clean, knowledge(), Seed(1))
    assert torch.equal(teacher.head.weight, head_of(clean, DATA).weight) == (not retrain_head)
    assert teacher.head.weight.requires_grad
