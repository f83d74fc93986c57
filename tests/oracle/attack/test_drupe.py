"""DRUPE: its terms in closed form and against loops, stages, adapting costs, resume, and a toy attack."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import digits
from cupel import metrics, progress
from cupel.attack.badencoder import BadEncoder
from cupel.attack.drupe import DRUPE
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, Interrupted, UsageError
from cupel.implanting import Aim, ImplantLearner
from cupel.implanting.spreading import DrupeLearner
from cupel.inference import features, triggered
from cupel.losses.adaptive import AdaptiveCost, CostRule
from cupel.losses.distribution import directions, mean_pair_cosine, sinkhorn_distance, sliced_wasserstein
from cupel.losses.spreading import balance, crowding, nearest_reference
from cupel.probe import Linear
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Goal, Knowledge
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(256)
PATCH = Patch(size=4)
TINY = {"steps": 10, "batch_size": 64, "lr": 0.01, "l1_draws": 4, "precision": "fp32"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def goal(n: int = 3, target: int = 1, trigger: Any = PATCH) -> Goal:
    rows = torch.arange(64)[torch.arange(64) % 4 == target][:n]
    return Goal(trigger, blobs(64, seed=9).subset(rows).inputs, "blobs", target)


def moved(clean: ImageEncoder) -> ImageEncoder:
    other = clean.copy()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.module.parameters():
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return other


def learner(encoder: ImageEncoder, clean: ImageEncoder, goals: list[Goal], **settings: Any) -> DrupeLearner:
    """In float64, so that what is compared does not drown in rounding."""
    encoder.module.double()
    clean.module.double()
    aims = []
    for one in goals:
        pixels = one.references.double() / 255
        with torch.no_grad():
            aims.append(Aim(one, pixels, clean(pixels)))
    with torch.no_grad():
        cached = clean(DATA.inputs.double() / 255)
    attack = DRUPE(l1_augment=False, **{"batch_size": 16, **settings})
    return DrupeLearner(attack, encoder, cached, DATA.ids, tuple(aims), per_epoch=4)


def batch(n: int = 16) -> Batch:
    rows = torch.arange(n) * 3
    return Batch(DATA.inputs[rows], rows, Seed(7))


# --- the parts ---


def test_pairs_by_loops() -> None:
    z = draw(5, 7)
    cosines = [float(F.cosine_similarity(z[i], z[j], dim=0)) for i in range(5) for j in range(i + 1, 5)]
    assert float(mean_pair_cosine(z)) == pytest.approx(sum(cosines) / 10)
    assert float(mean_pair_cosine(z, include_self=True)) == pytest.approx((sum(cosines) + 5) / 15)
    assert float(mean_pair_cosine(torch.ones(6, 3))) == pytest.approx(1)
    assert abs(float(mean_pair_cosine(draw(200, 2000)))) < 0.01
    assert float(mean_pair_cosine(draw(1, 4), include_self=True)) == pytest.approx(1)
    assert float(mean_pair_cosine(z)) == pytest.approx(metrics.concentration(z))


def test_sliced_wasserstein_by_loops() -> None:
    a, b, along = draw(6, 4), draw(6, 4, seed=1), F.normalize(draw(5, 4, seed=2), dim=1)
    total = 0.0
    for theta in along:
        left, right = sorted(float(row @ theta) for row in a), sorted(float(row @ theta) for row in b)
        total += sum((x - y) ** 2 for x, y in zip(left, right, strict=True)) / 6
    assert float(sliced_wasserstein(a, b, along)) == pytest.approx(math.sqrt(total / 5))
    assert float(sliced_wasserstein(3 * a, 3 * b, along)) == pytest.approx(3 * float(sliced_wasserstein(a, b, along)))


def test_sliced_wasserstein_of_equal_samples_is_0_with_gradient_0() -> None:
    a = draw(6, 4).requires_grad_()
    distance = sliced_wasserstein(a, a.detach().clone(), directions(5, 4, torch.Generator().manual_seed(0)).double())
    assert float(distance.detach()) == 0
    distance.backward()
    assert a.grad is not None
    assert float(a.grad.abs().max()) == 0


def test_directions_have_length_1_and_are_uniform() -> None:
    along = directions(4000, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(along.norm(dim=1), torch.ones(4000))
    assert torch.allclose(along.T @ along / 4000, torch.eye(3) / 3, atol=0.02)


def test_sinkhorn_comes_near_the_cheapest_matching() -> None:
    """Three points against three: the best of all six matchings, found by trying them."""
    from itertools import permutations

    a, b = draw(3, 2), draw(3, 2, seed=1)
    best = min(sum(float((a[i] - b[j]).square().sum()) for i, j in enumerate(p)) / 3 for p in permutations(range(3)))
    near = float(sinkhorn_distance(a, b, epsilon=0.01, iterations=500))
    assert near == pytest.approx(best, rel=0.02)
    assert float(sinkhorn_distance(a, b, epsilon=1.0, iterations=500)) > near


def test_nearest_reference_is_below_the_mean_and_equal_where_all_agree() -> None:
    similarity = draw(3, 8).tanh()
    assert float(nearest_reference(similarity)) < float(-similarity.mean())
    same = similarity[:1].expand(3, 8)
    assert float(nearest_reference(same)) == pytest.approx(float(-same.mean()))
    assert float(nearest_reference(similarity)) == pytest.approx(
        -sum(max(float(similarity[r, b]) for r in range(3)) for b in range(8)) / 8
    )


def test_balance() -> None:
    similarity = draw(3, 8)
    means = [float(row.mean()) for row in similarity]
    centre = sum(means) / 3
    assert float(balance(similarity)) == pytest.approx(math.sqrt(sum((m - centre) ** 2 for m in means) / 2))
    assert float(balance(similarity[:1])) == 0


@pytest.mark.parametrize(("L3", "penalty"), [(0.3, 0.0), (0.45, 0.09), (0.5, 0.1), (0.6, 0.6)])
def test_crowding(L3: float, penalty: float) -> None:
    assert float(crowding(torch.tensor(L3))) == pytest.approx(penalty)


def test_costs_follow_a_script() -> None:
    rule, state = DRUPE().cost_rule, AdaptiveCost(0.1)
    seen = []
    for met in (True, True, False, False, True):
        state = rule.after(state, met)
        seen.append(state.cost)
    down = 1.25**1.25
    assert down == pytest.approx(1.3217, abs=1e-4)
    assert seen == pytest.approx([0.125, 0.15625, 0.15625 / down, 0.15625 / down**2, 0.15625 / down**2 * 1.25])


def test_costs_are_patient() -> None:
    rule, state, seen = CostRule(1.5, 2.0, patience=3), AdaptiveCost(1.0), []
    for met in (True, True, False, True, True, True, False, False, False):
        state = rule.after(state, met)
        seen.append(state.cost)
    assert seen == [1, 1, 1, 1, 1, 1.5, 1.5, 1.5, 0.75]


# --- the loss ---


@pytest.mark.parametrize(("epoch", "stage"), [(1, 1), (2, 2), (4, 2), (5, 3), (90, 3)])
def test_loss_of_each_stage_by_loops(epoch: int, stage: int) -> None:
    clean = small_encoder()
    other = moved(clean)
    one = goal()
    it = learner(other, clean, [one], lambda_reference=0.7, lambda_utility=1.3, cost=0.4, cost_wasserstein=0.2)
    it.schedule.step.fill_(4 * (epoch - 1))
    with torch.no_grad():
        loss, parts = it.loss(batch())
        other.module.eval()
        x = batch().inputs
        ids = DATA.ids[batch().rows].tolist()
        f = other(x.double() / 255)
        e = other(one.trigger(x, ids, Seed(0)).double() / 255)
        r = other(one.references.double() / 255)
        c, c_r = clean(x.double() / 255), clean(one.references.double() / 255)

    def s(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a, b, dim=0))

    n = len(x)
    similarity = [[s(e[b], r[i]) for b in range(n)] for i in range(3)]
    L0 = -sum(max(row[b] for row in similarity) for b in range(n)) / n
    L1 = -sum(s(r[i], c_r[i]) for i in range(3)) / 3
    L2 = -sum(s(f[b], c[b]) for b in range(n)) / n
    L3 = sum(s(r[i], r[j]) for i in range(3) for j in range(i, 3)) / 6
    D = float(torch.tensor([sum(row) / n for row in similarity], dtype=torch.float64).std())
    S = sum(s(e[a], e[b]) for a in range(n) for b in range(n) if a != b) / (n * (n - 1))
    along = directions(50, f.shape[1], batch().seed.child("directions").torch()).double()
    W = float(sliced_wasserstein(e, f, along) / f.std(dim=0).mean())
    found = [float(parts[k]) for k in ("L0", "L1", "L2", "L3", "balance", "concentration", "wasserstein")]
    assert found == pytest.approx([L0, L1, L2, L3, D, S, W], abs=1e-6)
    penalty = L3 if L3 > 0.5 else 0.2 * L3 if L3 > 0.4 else 0.0
    expected = 0.7 * L1 + 1.3 * L2
    if stage == 1:
        expected += 0.5 * L3 - (0.2 * L3 if L3 < 0.2 else 0)
    elif stage == 2:
        expected += L0 + 2 * D + penalty
    else:
        expected += L0 + 0.4 * (D + S) + 0.2 * W + 0.5 * D + (1.5 * D if D > 0.1 else 0) + penalty
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_one_reference_is_badencoders_term() -> None:
    clean = small_encoder()
    other = moved(clean)
    it = learner(other, clean, [goal(1)])
    theirs = ImplantLearner(other, it.clean, DATA.ids, it.aims)
    with torch.no_grad():
        ours, terms = it.loss(batch())[1], theirs.loss(batch())[1]
    assert float(ours["L0"]) == pytest.approx(float(terms["L0"]), abs=1e-9)
    assert float(ours["L3"]) == pytest.approx(1)
    assert float(ours["balance"]) == 0


def test_two_goals_are_averaged() -> None:
    clean = small_encoder()
    other = moved(clean)
    first, second = goal(3), goal(2, 2, Patch(size=4, corner="top_left"))
    apart = [learner(other, clean, [one]) for one in (first, second)]
    both = learner(other, clean, [first, second])
    with torch.no_grad():
        alone = [it.loss(batch())[1] for it in apart]
        together = both.loss(batch())[1]
    for name in ("L0", "L3", "balance", "concentration", "wasserstein"):
        assert float(together[name]) == pytest.approx(sum(float(one[name]) for one in alone) / 2, abs=1e-6)


def test_gradient_by_finite_differences() -> None:
    """In the third stage, which has all terms."""
    clean = small_encoder(width=2)
    encoder = moved(clean)
    it = learner(encoder, clean, [goal()], cost=0.5, cost_wasserstein=0.5)
    it.schedule.step.fill_(4 * 10)
    weight = encoder.module.backbone.layer1.conv1.weight
    it.loss(batch(8))[0].backward()
    slope, direction, step = float(weight.grad.norm()), weight.grad / weight.grad.norm(), 1e-6
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(sign * step * direction)
            ends.append(float(it.loss(batch(8))[0]))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_costs_adapt_at_the_end_of_an_epoch_by_its_means() -> None:
    """Scripted means: only from the epoch after `adapt_after` on; c₁ also wants spread embeddings."""
    clean = small_encoder()
    it = learner(moved(clean), clean, [goal()], adapt_after=1)

    def epoch(L0: float, concentration: float) -> list[float]:
        for _ in range(4):
            it.schedule.sums.add_(torch.tensor([L0, -0.95, -0.95, concentration]))
            it.after_step()
        return it.schedule.costs[:, 0].tolist()

    assert epoch(-0.99, 0.1) == pytest.approx([0.1, 0.001])
    assert epoch(-0.99, 0.1) == pytest.approx([0.125, 0.00125])
    assert epoch(-0.99, 0.9) == pytest.approx([0.15625, 0.00125 / 1.25**1.25])
    assert epoch(-0.5, 0.1) == pytest.approx([0.15625 / 1.25**1.25, 0.00125 / 1.25**2.5])
    assert it.epoch == 5


# --- the attack ---


def implant(clean: ImageEncoder, goals: tuple[Goal, ...], checkpoint: Any = None, **settings: Any) -> Any:
    attack = DRUPE(**{**TINY, **settings})
    return attack.implant(clean, Knowledge(goals, DATA.without_labels("drupe")), Seed(1), checkpoint=checkpoint)


def test_batch_norm_and_the_clean_encoder_stay_and_seeds_repeat() -> None:
    clean = small_encoder()
    before = copy.deepcopy(clean.module.state_dict())
    goals = (goal(trigger=None),)
    made = implant(clean, goals, trigger=PATCH)
    after, again = made.model.module.state_dict(), implant(clean, goals, trigger=PATCH).model.module.state_dict()
    norms = [k for k in before if ".bn" in k or "downsample.1" in k]
    assert len(norms) >= 20
    assert all(torch.equal(before[k], after[k]) for k in norms)
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])
    assert all(torch.equal(v, before[k]) for k, v in clean.module.state_dict().items())
    assert all(torch.equal(v, again[k]) for k, v in after.items())
    assert [g.trigger for g in made.goals] == [PATCH]
    assert not made.model.module.training


def test_a_resumed_run_repeats_the_unbroken_one(tmp_path: Any, monkeypatch: Any) -> None:
    """Broken in the third stage, in the middle of an epoch, after the costs had adapted."""
    clean, settings = small_encoder(), {"steps": 14, "adapt_after": 1, "warmup_epochs": 1, "attract_epochs": 0}
    whole = implant(clean, (goal(),), **settings)
    assert len(set(whole.history["cost"])) > 1
    step = DrupeLearner.after_step

    def stopping(self: DrupeLearner) -> None:
        step(self)
        if int(self.schedule.step) == 9:
            progress.request_stop(2)

    with monkeypatch.context() as patched:
        patched.setattr(DrupeLearner, "after_step", stopping)
        try:
            with pytest.raises(Interrupted):
                implant(clean, (goal(),), tmp_path / "state", **settings)
        finally:
            progress.request_stop(None)
    resumed = implant(clean, (goal(),), tmp_path / "state", **settings)
    assert resumed.history == whole.history
    for name, value in whole.model.module.state_dict().items():
        assert torch.equal(value, resumed.model.module.state_dict()[name]), name


@pytest.mark.parametrize("goals", [(), (Goal(PATCH, None, "blobs", 1),)])
def test_an_attacker_with_nothing_is_refused(goals: tuple[Goal, ...]) -> None:
    with pytest.raises(DataError, match=r"drupe: .*(goal|reference)"):
        implant(small_encoder(), goals)


def test_published_defaults_and_presets() -> None:
    ours = DRUPE.preset("published")
    assert (ours.lr, ours.epochs, ours.batch_size, ours.momentum, ours.weight_decay) == (0.05, 120, 256, 0.9, 5e-4)
    assert (ours.cost, ours.cost_wasserstein, ours.projections, ours.patience) == (0.1, 0.001, 50, 1)
    assert (ours.warmup_epochs, ours.attract_epochs, ours.adapt_after) == (1, 3, 20)
    with pytest.raises(UsageError, match="did you mean 'fast'"):
        DRUPE.preset("fsat")


@pytest.mark.slow
def test_on_digits_it_spreads_what_badencoder_piles_up() -> None:
    one = digits.victim()
    attack = DRUPE.preset("fast")
    recipe = {name: getattr(attack, name) for name in ("trigger", "steps", "batch_size", "optimizer", "lr", "l1_draws")}
    found = []
    for method in (attack, BadEncoder(**recipe, warmup_steps=25, schedule="cosine", weight_decay=0.0)):
        made = method.implant(one.encoder, one.attacker(3), Seed(0))
        accuracy, success = digits.outcome(made.model, made.goals[0])
        baseline = digits.outcome(one.encoder, made.goals[0])
        assert abs(accuracy - baseline[0]) <= 0.03
        assert baseline[1] < 0.1
        h, h_hit = (features(made.model, x) for x in (one.test, triggered(one.test, PATCH, Seed(0))))
        along = directions(200, h.shape[1], torch.Generator().manual_seed(0))
        far = float(sliced_wasserstein(h_hit, h, along) / h.std(dim=0).mean())
        found.append((success, metrics.concentration(h_hit), far))
    assert found[0][0] >= 0.85  # 0.935, 1.000 and 0.991 with three victims
    assert found[0][1] < 0.5 < 0.9 < found[1][1]
    assert found[0][2] < 0.3 * found[1][2]


@pytest.mark.full
def test_toy_attack_works() -> None:
    """With one reference: on toys of four classes, several are driven apart into other classes."""
    victim, test, one = trained_encoder(DATA, steps=80, width=16), blobs(256, seed=5), goal(1)
    recipe = {"steps": 160, "batch_size": 64, "lr": 2e-3, "optimizer": "adamw", "schedule": "cosine", "l1_draws": 8}
    model = DRUPE(**recipe).implant(victim, Knowledge((one,), DATA.without_labels("drupe")), Seed(0)).model
    hit = triggered(test, one.trigger, Seed(0))
    head = Linear().fit_features(features(model, DATA), DATA.labels, 4, Seed(0))
    right, n = metrics.accuracy(head(features(model, test)).argmax(1), test.labels)
    hits, m = metrics.attack_success_rate(head(features(model, hit)).argmax(1), test.labels, 1)
    assert right / n >= 0.97
    assert hits / m >= 0.9
