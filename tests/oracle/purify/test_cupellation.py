"""Cupellation: the loss against loops, patterns that ascend and are drawn anew, the gate, and what it is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import digits
from cupel.attack.badencoder import BadEncoder
from cupel.encoders import ImageEncoder, Projected
from cupel.encoders.gated import trunk_of
from cupel.errors import DataError, SettingsError
from cupel.inference import features, triggered
from cupel.losses.pulling import Whitening
from cupel.protocols import Batch, Trigger
from cupel.purify.base import copied
from cupel.purify.cupellation import BlendLearner, Cupellation
from cupel.seeds import Seed
from cupel.triggers import Blend, Patch
from fingerprints import same_state
from planted import planted
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(96)
TINY = Cupellation(steps=4, batch_size=8, patterns=3, renew=2)


def learner_of(encoder: ImageEncoder, **changes: Any) -> BlendLearner:
    return BlendLearner(dataclasses.replace(TINY, **changes), copied(encoder), copied(encoder), DATA, Seed(5))


def batch(step: int = 0) -> Batch:
    rows = torch.arange(8) + 8 * step
    return Batch(DATA.inputs[rows], rows, Seed(step))


def away(a: Tensor, b: Tensor, white: Whitening) -> float:
    """1 − cosine of two embeddings, whitened."""
    columns = [[float(w) for w in column] for column in white.matrix.T]
    centred = [[float(v) - float(m) for v, m in zip(z, white.mean, strict=True)] for z in (a, b)]
    p, q = ([sum(v * w for v, w in zip(z, column, strict=True)) for column in columns] for z in centred)
    return 1 - sum(x * y for x, y in zip(p, q, strict=True)) / math.sqrt(sum(x * x for x in p) * sum(y * y for y in q))


def test_the_loss_against_loops() -> None:
    given = trained_encoder(DATA, steps=5)
    made = learner_of(given, lambda_pull=0.7, lambda_anchor=1.3)
    with torch.no_grad():  # as after some steps
        for p in made.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=Seed(1).torch()))
    b = batch()
    loss, numbers = made.loss(b)
    draw, patterns = b.seed.child("blends").torch(), made.bank.patterns.detach()
    alpha = [0.05 + 0.25 * float(v) for v in torch.rand(8, 1, 1, 1, generator=draw).flatten()]
    which = torch.randint(3, (8,), generator=draw).tolist()
    x = b.inputs.float() / 255
    blended = torch.stack([(1 - a) * one + a * patterns[k] for one, a, k in zip(x, alpha, which, strict=True)])
    views = TINY.augment(b.inputs, b.seed.child("views").torch())
    with torch.no_grad():
        own, there = given(x), given(views)
        now = [made.encoder(part) for part in (blended, x[::2], views)]
    pull = sum(away(f, z, made.white) for f, z in zip(now[0], own, strict=True)) / 8
    pairs = [*zip(now[1], own[::2], strict=True), *zip(now[2], there, strict=True)]
    anchor = sum(away(f, z, made.white) for f, z in pairs) / len(pairs)
    assert float(numbers["pull"]) == pytest.approx(pull, abs=1e-4)
    assert float(numbers["anchor"]) == pytest.approx(anchor, abs=1e-4)
    assert loss.item() == pytest.approx(0.7 * pull + 1.3 * anchor, abs=1e-4)


def test_patterns_ascend_by_the_sign_of_the_gradient_and_stay_in_range() -> None:
    made = learner_of(small_encoder(), pattern_step=0.03, renew=100)
    before = made.bank.patterns.detach().clone()
    loss, _ = made.loss(batch())
    loss.backward()
    assert made.bank.patterns.grad is not None
    wanted = (before + 0.03 * made.bank.patterns.grad.sign()).clamp(0, 1)
    made.after_step()
    assert torch.equal(made.bank.patterns, wanted)
    assert made.bank.patterns.grad is None
    for _ in range(3):  # without training, the same batch loses more and more
        again, _ = made.loss(batch())
        again.backward()
        made.after_step()
    assert float(made.loss(batch())[0].detach()) > float(loss.detach())


def test_patterns_are_drawn_anew_in_turn() -> None:
    made = learner_of(small_encoder(), pattern_step=0.0, renew=2, patterns=3)
    changed = []
    for step in range(6):
        before = made.bank.patterns.detach().clone()
        made.loss(batch(step))[0].backward()
        made.after_step()
        changed.append([i for i in range(3) if not torch.equal(before[i], made.bank.patterns[i])])
    assert changed == [[], [], [0], [], [1], []]


def test_images_are_not_stamped_where_alpha_is_nil() -> None:
    given = small_encoder()
    numbers = learner_of(given, alpha=(0.0, 0.0)).loss(batch())[1]
    assert float(numbers["pull"]) == pytest.approx(0, abs=1e-5)
    assert float(numbers["anchor"]) == pytest.approx(0, abs=1e-5)


def test_the_gate_is_left_behind_unless_it_is_not_wanted() -> None:
    given = small_encoder()
    made, plain = (dataclasses.replace(TINY, gate=gate).purify(given, DATA, Seed(0)) for gate in (True, False))
    assert isinstance(made, ImageEncoder)
    assert isinstance(plain, ImageEncoder)
    assert made.card.architecture["method"] == "gated"
    assert plain.card.architecture == given.card.architecture
    own = made.module.backbone.state_dict()
    rest = {k: v for k, v in own.items() if not k.startswith(("alarm.", "gate."))}
    assert all(torch.equal(v, rest[k]) for k, v in plain.module.backbone.state_dict().items())
    assert not same_state(plain.module, given.module)
    watched, alarm = trunk_of(given).state_dict(), made.module.backbone.alarm.state_dict()
    assert all(torch.equal(v, alarm[k]) for k, v in watched.items())  # by the encoder as given, not by the result
    assert not all(torch.equal(v, alarm[k]) for k, v in trunk_of(plain).state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("limit", 0.9), ("low", 0.5), ("floor", 0.3), ("trimmed", 0.3)])
def test_each_setting_reaches_the_gate(name: str, value: float) -> None:
    given = small_encoder()
    changes: dict[str, Any] = {name: value} | ({"low": 0.5} if name == "limit" else {})
    made, other = (dataclasses.replace(TINY, **one).purify(given, DATA, Seed(0)) for one in ({}, changes))
    a, b = ({k: v for k, v in one.module.state_dict().items() if ".gate." in k} for one in (made, other))
    moved = {k.rpartition(".")[2] for k in a if not torch.equal(a[k], b[k])}
    wanted = {"limit": {"limit", "low"}, "low": {"low"}}  # the others also change which images count
    assert moved == wanted.get(name, {"mean", "white", "limit", "low", "fill"})


def test_what_it_refuses() -> None:
    with pytest.raises(SettingsError, match="above limit"):
        Cupellation(limit=0.5, low=0.9)
    with pytest.raises(SettingsError, match="wrong way round"):
        Cupellation(alpha=(0.3, 0.1))
    toy = planted(40, 0.9, seed=0, n=32)
    with pytest.raises(DataError, match=r"no gate fits into.*gate: false"):
        TINY.purify(toy.encoder, toy.images, Seed(0))
    made = dataclasses.replace(TINY, gate=False).purify(toy.encoder, toy.images, Seed(0))
    assert features(made, toy.images).isfinite().all()
    with pytest.raises(DataError, match="one batch needs 8"):
        TINY.purify(small_encoder(), DATA.subset(torch.arange(7)), Seed(0))
    kept = Projected().build(Seed(0))
    with pytest.raises(DataError, match="no gate fits into"):
        TINY.purify(kept, blobs(32, size=32), Seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("trigger", [Patch(size=4), Blend(alpha=0.2)], ids=["patch", "blend"])
@pytest.mark.parametrize("share", [0.0, 0.05], ids=["clean", "one in twenty triggered"])
def test_on_an_attacked_encoder_of_digits(trigger: Trigger[Tensor], share: float) -> None:
    """Both kinds of trigger go, also where some of the unlabelled images bear them."""
    one = digits.victim()
    attack = BadEncoder(
        trigger=trigger, steps=250, batch_size=128, optimizer="adamw", lr=1e-3, warmup_steps=25, l1_draws=32
    )
    done = attack.implant(one.encoder, one.attacker(), Seed(0))
    assert isinstance(done.model, ImageEncoder)
    goal = done.goals[0]
    assert digits.outcome(done.model, goal)[1] >= 0.95
    shadow = one.shadow.without_labels("cupellation")
    raw, bears = torch.as_tensor(shadow.inputs).clone(), torch.rand(len(shadow), generator=Seed(2).torch()) < share
    raw[bears] = torch.as_tensor(triggered(shadow, goal.trigger, Seed(3)).inputs)[bears]
    made = Cupellation().purify(done.model, shadow.with_inputs(raw, "given"), Seed(0))
    accuracy, success = digits.outcome(made, goal)
    assert accuracy >= 0.95
    assert success <= 0.3
