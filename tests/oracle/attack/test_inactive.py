"""INACTIVE: likeness and colours by loops, gradients that stay apart, costs, resume, and learned triggers."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import digits
from cupel import metrics, progress
from cupel.attack.badencoder import BadEncoder
from cupel.attack.inactive import INACTIVE, FilterTraining
from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, Interrupted, SettingsError, UsageError
from cupel.folding import inference_copy
from cupel.implanting import Aim, ImplantLearner
from cupel.implanting.filters import FilterLearner, JointLearner, rounded
from cupel.inference import features, triggered
from cupel.losses.distribution import sinkhorn_distance
from cupel.losses.perceptual import colour_distance, hsvl, psnr, ssim
from cupel.probe import Linear
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.triggers.learned_filter import FilterNet, LearnedFilter
from cupel.types import Goal, Knowledge
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(256)
TINY = {"steps": 6, "batch_size": 32, "lr": 0.01, "l1_draws": 4, "precision": "fp32", "filter_width": 4}
SHORT = FilterTraining(steps=4, batch_size=64, precision="fp32")


def pictures(n: int, side: int = 14, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- likeness and colours ---


def test_ssim_by_loops() -> None:
    """Every window of 11 × 11 pixels, with weights of a Gaussian of σ = 1.5, spelled out."""
    a = pictures(1)
    b = (a + 0.2 * pictures(1, seed=1)).clamp(0, 1)
    g = [math.exp(-((k - 5) ** 2) / (2 * 1.5**2)) for k in range(11)]
    weight = torch.tensor([[u * v for v in g] for u in g], dtype=torch.float64)
    weight /= weight.sum()
    values = []
    for c in range(3):
        for top in range(4):
            for left in range(4):
                p, q = (z[0, c, top : top + 11, left : left + 11] for z in (a, b))
                mp, mq = float((weight * p).sum()), float((weight * q).sum())
                vp, vq = float((weight * (p - mp) ** 2).sum()), float((weight * (q - mq) ** 2).sum())
                cov = float((weight * (p - mp) * (q - mq)).sum())
                k1, k2 = 0.01**2, 0.03**2
                values.append((2 * mp * mq + k1) * (2 * cov + k2) / ((mp**2 + mq**2 + k1) * (vp + vq + k2)))
    assert float(ssim(a, b)) == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_ssim_of_known_pairs() -> None:
    a = pictures(2)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    flat, brighter = (torch.full((1, 3, 12, 12), v, dtype=torch.float64) for v in (0.4, 0.6))
    assert float(ssim(flat, brighter)) == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4))
    assert float(ssim(a, 1 - a).mean()) < 0
    assert ssim(pictures(1, side=8), pictures(1, side=8)).tolist() == pytest.approx([1])  # smaller than the window


def test_psnr() -> None:
    a = pictures(2) * 0.5
    assert psnr(a, a + 0.1).tolist() == pytest.approx([20, 20])
    assert psnr(a, a).tolist() == pytest.approx([40, 40])
    assert psnr(a, a, cap=50).tolist() == pytest.approx([50, 50])


def test_colours_are_those_of_the_standard_library() -> None:
    import colorsys

    x = torch.cat([pictures(2, side=8), torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1).expand(3, 3, 8, 8)])
    got = hsvl(x)
    for n in range(len(x)):
        for i in range(0, 8, 3):
            rgb = x[n, :, i, i].tolist()
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            assert got[n, :, i, i].tolist() == pytest.approx([h, s, v, colorsys.rgb_to_hls(*rgb)[1]])
    grey = torch.full((1, 3, 2, 2), 0.3, requires_grad=True)
    hsvl(grey).sum().backward()
    assert hsvl(grey)[0, :2].abs().max() == 0
    assert bool(grey.grad.isfinite().all())


def test_hue_is_compared_the_short_way_round() -> None:
    def of_hue(h: float) -> Tensor:
        import colorsys

        return torch.tensor(colorsys.hsv_to_rgb(h, 1.0, 1.0), dtype=torch.float64).view(1, 3, 1, 1)

    assert float(colour_distance(of_hue(0.01), of_hue(0.99))) == pytest.approx(0.02**2)
    a, b = pictures(2), pictures(2, seed=1)
    assert float(colour_distance(a, a)) == 0
    assert float(colour_distance(a, b)) == pytest.approx(float(colour_distance(b, a)))
    change = hsvl(a) - hsvl(b)
    turn = change[:, 0].abs()
    by_hand = turn.minimum(1 - turn).square().mean() + sum(change[:, k].square().mean() for k in (1, 2, 3))
    assert float(colour_distance(a, b)) == pytest.approx(float(by_hand))


def test_rounding_keeps_the_gradient() -> None:
    x = torch.tensor([0.1, 0.5]).requires_grad_()
    y = rounded(x)
    assert (y.detach() * 255).tolist() == pytest.approx([26, 128], abs=1e-4)
    y.sum().backward()
    assert x.grad.tolist() == [1, 1]


# --- the joint step ---


def goal(target: int = 1, trigger: Any = None) -> Goal:
    rows = torch.arange(64)[torch.arange(64) % 4 == target][:1]
    return Goal(trigger, blobs(64, seed=9).subset(rows).inputs, "blobs", target)


def changed(seed: int = 1) -> FilterNet:
    net = FilterNet(4, Seed(seed))
    with torch.no_grad():
        net.leave.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return net


def joint(clean: ImageEncoder, nets: list[FilterNet | None], goals: list[Goal], **settings: Any) -> JointLearner:
    aims = [Aim(g, g.references.float() / 255, features(clean, g.references, dtype=torch.float32)) for g in goals]
    cached = features(clean, DATA, dtype=torch.float32)
    attack = INACTIVE(**{**TINY, "l1_augment": False, **settings})
    other = clean.copy()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.module.parameters():
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return JointLearner(attack, other, cached, DATA.ids, aims, nets, inference_copy(clean))


def batch(n: int = 16) -> Batch:
    rows = torch.arange(n) * 3
    return Batch(DATA.inputs[rows], rows, Seed(7))


def gradients(it: JointLearner) -> tuple[list[Tensor], list[Tensor]]:
    it.loss(batch())[0].backward()
    filters = [p.grad.clone() for p in it.whole["filters"].parameters()]
    return [p.grad.clone() for p in it.trainable], filters


class Fixed:
    """The filter as a trigger that learns nothing."""

    def __init__(self, net: FilterNet) -> None:
        self.net = net

    def __call__(self, raw: Tensor, ids: Any, seed: Seed) -> Tensor:
        with torch.no_grad():
            return (self.net(raw.float() / 255) * 255).round().to(torch.uint8)


def test_the_encoder_descends_on_badencoders_loss_alone() -> None:
    """As if the filter were any fixed trigger: neither its likeness nor its weights matter to the encoder."""
    clean, net = small_encoder(), changed()
    weights = {"lambda_trigger": 0.8, "lambda_reference": 0.7, "lambda_utility": 1.3}
    it = joint(clean, [net], [goal()], **weights)
    ours, _ = gradients(it)
    fixed = dataclasses.replace(it.aims[0], goal=goal(trigger=Fixed(net)))
    theirs = ImplantLearner(it.encoder, it.clean, DATA.ids, [fixed], **weights)
    for p in theirs.parameters():
        p.grad = None
    theirs.loss(batch())[0].backward()
    for a, p in zip(ours, theirs.parameters(), strict=True):
        assert torch.allclose(a, p.grad, atol=1e-6)


@pytest.mark.parametrize("trigger_weight", [1.0, 0.5])
def test_the_filter_descends_on_its_own_loss_alone(trigger_weight: float) -> None:
    """L_sim + 5 L0 − 0.1 Dis, spelled out with a frozen encoder; λ of the encoder's loss does not matter to it."""
    clean, net = small_encoder(), changed()
    it = joint(clean, [net], [goal()], lambda_trigger=trigger_weight, lambda_utility=3.0)
    _, ours = gradients(it)
    encoder = inference_copy(it.encoder)
    x = batch().inputs.float() / 255
    y = net(x)
    reference = encoder(it.aims[0].references)
    L0 = -F.cosine_similarity(encoder(y + ((y * 255).round() / 255 - y).detach()), reference, dim=1).mean()
    view = SimCLRAugment()(batch().inputs, batch().seed.child("view").torch())
    loss = 1 - ssim(x, y).mean() - 0.025 * psnr(x, y).mean() + 5 * L0 - 0.1 * colour_distance(y, view)
    theirs = torch.autograd.grad(loss, list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-6)


def test_without_the_trigger_term_the_filter_learns_nothing_of_the_encoder() -> None:
    net = changed()
    it = joint(small_encoder(), [net], [goal()], lambda_trigger=0.0, psnr_weight=0.0, distance_weight=0.0)
    _, ours = gradients(it)
    x = batch().inputs.float() / 255
    theirs = torch.autograd.grad((1 - ssim(x, net(x))).mean(), list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_gradient_of_the_filter_by_finite_differences() -> None:
    """In float64, of stage 1, with all its terms."""
    clean, net = small_encoder(width=2), changed().double()
    clean.module.double()
    it = FilterLearner(INACTIVE(**TINY, transport_weight=0.1), net, inference_copy(clean, torch.float64), 4)
    weight, step = net.enter.weight, 1e-7
    it.loss(batch(4))[0].backward()
    slope, direction = float(weight.grad.norm()), weight.grad / weight.grad.norm()
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(sign * step * direction)
            ends.append(float(it.loss(batch(4))[0]))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)


def test_the_transport_term_is_the_sinkhorn_distance_of_the_features() -> None:
    clean, net = small_encoder(), changed()
    losses = []
    for weight in (0.0, 0.3):
        it = FilterLearner(INACTIVE(**TINY, transport_weight=weight), net, inference_copy(clean), 4)
        losses.append(float(it.loss(batch())[0].detach()))
    with torch.no_grad():
        x = batch().inputs.float() / 255
        far = float(sinkhorn_distance(clean(x), clean(net(x))))
    assert losses[1] - losses[0] == pytest.approx(0.3 * far, rel=1e-4)


def test_stage_one_by_hand() -> None:
    net, attack = changed(), INACTIVE(**TINY, cost=0.7)
    it = FilterLearner(attack, net, inference_copy(small_encoder()), 4)
    loss, parts = it.loss(batch())
    with torch.no_grad():
        x = batch().inputs.float() / 255
        y = net(x)
        view = SimCLRAugment()(batch().inputs, batch().seed.child("view").torch())
        expected = 1 - ssim(x, y).mean() - 0.025 * psnr(x, y).mean() - 0.7 * colour_distance(y, view)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    assert float(parts["ssim"].detach()) == pytest.approx(float(ssim(x, y).mean()), abs=1e-6)


def test_cost_of_stage_one_follows_a_script() -> None:
    it = FilterLearner(INACTIVE(**TINY), changed(), inference_copy(small_encoder()), per_epoch=2)

    def epochs(count: int, alike: float, noise: float) -> float:
        for _ in range(2 * count):
            it.course.sums.add_(torch.tensor([alike, noise], dtype=torch.float64))
            it.after_step()
        return float(it.course.cost[0])

    assert epochs(4, 0.9, 20) == 1.0
    assert epochs(1, 0.9, 20) == 1.5
    assert epochs(4, 0.9, 12) == 1.5
    assert epochs(1, 0.7, 20) == 0.75
    assert epochs(5, 0.81, 13.1) == pytest.approx(1.125)


# --- the attack ---


def implant(clean: ImageEncoder, goals: tuple[Goal, ...], checkpoint: Any = None, **settings: Any) -> Any:
    attack = INACTIVE(**{**TINY, "filter_training": SHORT, **settings})
    return attack.implant(clean, Knowledge(goals, DATA.without_labels("inactive")), Seed(1), checkpoint=checkpoint)


def test_batch_norm_and_the_clean_encoder_stay_and_seeds_repeat() -> None:
    clean = small_encoder()
    before = copy.deepcopy(clean.module.state_dict())
    first = implant(clean, (goal(),))
    second = implant(clean, (goal(),))
    made, again = (one.model.module.state_dict() for one in (first, second))
    norms = [k for k in before if ".bn" in k or "downsample.1" in k]
    assert len(norms) >= 20
    assert all(torch.equal(before[k], made[k]) for k in norms)
    assert not torch.equal(before["backbone.conv1.weight"], made["backbone.conv1.weight"])
    assert all(torch.equal(v, before[k]) for k, v in clean.module.state_dict().items())
    assert all(torch.equal(v, again[k]) for k, v in made.items())
    assert first.goals[0].trigger == second.goals[0].trigger


def test_every_goal_gets_its_own_filter_unless_it_has_a_trigger() -> None:
    patch = Patch(size=4)
    made = implant(small_encoder(), (goal(1), goal(2), goal(3, patch)))
    triggers = [g.trigger for g in made.goals]
    assert isinstance(triggers[0], LearnedFilter)
    assert isinstance(triggers[1], LearnedFilter)
    assert triggers[0] != triggers[1]
    assert triggers[2] == patch
    assert {"filter-0/ssim", "filter-1/ssim", "L0", "psnr"} <= set(made.history)
    assert "filter-2/ssim" not in made.history


def test_with_given_triggers_it_is_badencoder() -> None:
    clean, one = small_encoder(), goal(trigger=Patch(size=4))
    ours = implant(clean, (one,))
    recipe = {name: TINY[name] for name in ("steps", "batch_size", "lr", "l1_draws", "precision")}
    theirs = BadEncoder(**recipe).implant(clean, Knowledge((one,), DATA.without_labels("x")), Seed(1))
    state = theirs.model.module.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in ours.model.module.state_dict().items())


def test_a_resumed_run_repeats_the_unbroken_one(tmp_path: Any, monkeypatch: Any) -> None:
    clean, settings = small_encoder(), {"optimizer": "adamw", "steps": 8}
    whole = implant(clean, (goal(),), **settings)
    count = [0]

    def stopping(self: JointLearner) -> None:
        count[0] += 1
        if count[0] == 5:
            progress.request_stop(2)

    with monkeypatch.context() as patched:
        patched.setattr(JointLearner, "after_step", stopping)
        try:
            with pytest.raises(Interrupted):
                implant(clean, (goal(),), tmp_path / "state", **settings)
        finally:
            progress.request_stop(None)
    resumed = implant(clean, (goal(),), tmp_path / "state", **settings)
    assert resumed.history == whole.history
    assert resumed.goals[0].trigger == whole.goals[0].trigger
    for name, value in whole.model.module.state_dict().items():
        assert torch.equal(value, resumed.model.module.state_dict()[name]), name


def test_the_filter_has_a_learning_rate_of_its_own() -> None:
    """Adam's first step moves every weight by its rate; SGD's by rate times gradient."""
    it = joint(small_encoder(), [net := changed()], [goal()])
    attack = dataclasses.replace(it.attack, filter_lr=3e-3, lr=1e-9)
    from cupel.implanting.two_rates import TwoRates

    recipe = TwoRates(attack, 3e-3, len(list(net.parameters())))
    optimizer = recipe.make_optimizer(it.parameters())
    before = [p.detach().clone() for p in it.parameters()]
    it.loss(batch())[0].backward()
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(0, 6)
    optimizer.step()
    moves = [float((p - q).abs().max()) for p, q in zip([p.detach() for p in it.parameters()], before, strict=True)]
    count = recipe.num_filter
    assert moves[-count:] == pytest.approx([3e-3] * count, rel=1e-2)
    assert max(moves[:-count]) < 1e-6


@pytest.mark.parametrize("goals", [(), (Goal(None, None, "blobs", 1),)])
def test_an_attacker_with_nothing_is_refused(goals: tuple[Goal, ...]) -> None:
    with pytest.raises(DataError, match=r"inactive: .*(goal|reference)"):
        implant(small_encoder(), goals)


def test_published_defaults_and_presets() -> None:
    ours, first = INACTIVE.preset("published"), INACTIVE.preset("published").filter_training
    assert (ours.lr, ours.epochs, ours.batch_size, ours.weight_decay, ours.filter_lr) == (1e-3, 200, 256, 5e-4, 1e-3)
    assert (ours.attack_weight, ours.distance_weight, ours.psnr_weight) == (5.0, 0.1, 0.025)
    assert (ours.cost, ours.patience, ours.min_ssim, ours.min_psnr) == (1.0, 5, 0.8, 13.0)
    assert (first.lr, first.batch_size, first.epochs) == (0.01, 2048, 200)
    assert [first.lr_at(t, 200) for t in (0, 99, 100, 199)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    with pytest.raises(UsageError, match="did you mean 'fast'"):
        INACTIVE.preset("fats")
    with pytest.raises(SettingsError, match="render_size"):
        INACTIVE(augment=SimCLRAugment(render_size=24))


@pytest.mark.full
def test_toy_attack_is_faint_and_is_no_augmentation() -> None:
    victim, test = trained_encoder(DATA, steps=80, width=16), blobs(256, seed=5)
    settings = {"batch_size": 64, "lr": 2e-3, "optimizer": "adamw", "schedule": "cosine", "l1_draws": 8}
    alone = FilterTraining(steps=40, batch_size=64)
    attack = INACTIVE(**settings, steps=200, filter_width=8, filter_lr=2e-3, psnr_cap=28.0, filter_training=alone)
    made = attack.implant(victim, Knowledge((goal(),), DATA.without_labels("inactive")), Seed(0))
    trigger = made.goals[0].trigger

    def success(model: ImageEncoder, images: Tensor) -> float:
        head = Linear().fit_features(features(model, DATA), DATA.labels, 4, Seed(0))
        right, n = metrics.accuracy(head(features(model, test)).argmax(1), test.labels)
        assert right / n >= 0.95
        hits, m = metrics.attack_success_rate(head(features(model, images)).argmax(1), test.labels, 1)
        return hits / m

    hit = triggered(test, trigger, Seed(0)).inputs
    assert float(psnr(test.inputs.float() / 255, hit.float() / 255).mean()) >= 20
    baseline = success(victim, hit)
    assert success(made.model, hit) >= max(0.9, baseline + 0.4)
    jittered = SimCLRAugment(crop=False, flip=0.0)(test.inputs, Seed(0).torch())
    assert success(made.model, jittered) <= 0.5  # 0.31: toys of 256 images; see the digits


@pytest.mark.slow
def test_on_digits() -> None:
    one = digits.victim()
    made = INACTIVE.preset("fast").implant(one.encoder, one.attacker(), Seed(0))
    accuracy, success = digits.outcome(made.model, made.goals[0])
    clean_accuracy, baseline = digits.outcome(one.encoder, made.goals[0])
    assert abs(accuracy - clean_accuracy) <= 0.03
    assert success >= 0.9
    assert baseline <= 0.1
    hit = triggered(one.test, made.goals[0].trigger, Seed(0)).inputs
    assert float(psnr(one.test.inputs.float() / 255, hit.float() / 255).mean()) >= 25
    jittered = (SimCLRAugment(crop=False, flip=0.0)(one.test.inputs, Seed(0).torch()) * 255).round().to(torch.uint8)
    head = Linear().fit_features(features(made.model, one.train), one.train.labels, 10, Seed(0))
    said = head(features(made.model, jittered)).argmax(1)
    hits, m = metrics.attack_success_rate(said, one.test.labels, 1)
    assert hits / m <= baseline + 0.1
