"""BCU: which entries are drawn anew, the losses against loops, and that drawing nothing changes nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cupel import metrics
from cupel.encoders import ENCODERS, Fast, ImageEncoder
from cupel.errors import SettingsError
from cupel.inference import features
from cupel.protocols import Batch
from cupel.purify.base import copied
from cupel.purify.bcu import (
    BCU,
    BCULearner,
    part_rates,
    redraw,
    redrawn,
    relational_loss,
    softened_loss,
    temperature_at,
)
from cupel.purify.unlabelled import fresh_copy
from cupel.seeds import Seed
from toys import blobs, small_encoder, trained_encoder

DATA = blobs(64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(z: Tensor, temperature: float) -> list[float]:
    e = [math.exp(float(v) / temperature) for v in z]
    return [one / sum(e) for one in e]


def test_each_part_changes_at_its_rate_and_batch_norm_not_at_all() -> None:
    given = Fast(width=16, input_size=16).build(Seed(0))
    with torch.no_grad():
        for i, part in enumerate(m for m in given.module.modules() if isinstance(m, nn.BatchNorm2d)):
            part.weight.uniform_(0.5, 1.5, generator=Seed(i).torch())
            part.get_buffer("running_mean").normal_(generator=Seed(i).torch())
    made = copied(given)
    redraw(made, (0.5, 0.03, 0.09, 0.27), Seed(1))
    before = given.module.state_dict()
    changed: dict[str, list[int]] = {}
    for name, value in made.module.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            assert torch.equal(value, before[name]), name
        else:
            part = name.split(".")[1]
            hit, n = changed.setdefault(part, [0, 0])
            changed[part] = [hit + int((value != before[name]).sum()), n + value.numel()]
    for (part, rate), wanted in zip(
        {"conv1": 0.5, "layer1": 0.03, "layer2": 0.09, "layer3": 0.27}.items(), changed, strict=True
    ):
        hit, n = changed[part]
        assert part == wanted
        assert abs(hit - rate * n) < 4 * math.sqrt(n * rate * (1 - rate)), part


def test_new_entries_are_those_of_a_fresh_network() -> None:
    given = small_encoder()
    made = copied(given)
    redraw(made, [1.0], Seed(1))
    fresh = fresh_copy(given, Seed(1).child("values"))
    for (name, a), b in zip(made.module.named_parameters(), fresh.module.parameters(), strict=True):
        if a.ndim > 1:
            assert torch.equal(a, b), name
            bound = 1 / math.sqrt(a[0].numel())  # torch's default: uniform within 1/√fan_in
            assert float(a.detach().abs().max()) <= bound
            assert float(a.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_rates_of_nought_and_one() -> None:
    a, b = draw(3, 4), draw(3, 4, seed=1)
    assert torch.equal(redrawn(a, b, 0.0, torch.Generator()), a)
    assert torch.equal(redrawn(a, b, 1.0, torch.Generator()), b)


@pytest.mark.parametrize("name", ["fast", "resnet18"])
def test_late_parts_get_the_high_rates(name: str) -> None:
    rates = BCU().rates
    assert part_rates(rates, 5) == [0.01, 0.01, 0.03, 0.09, 0.27]
    assert part_rates(rates, 4) == [0.01, 0.03, 0.09, 0.27]
    assert part_rates(rates, 7) == [0.01, 0.01, 0.01, 0.01, 0.03, 0.09, 0.27]
    small = {"fast": {"width": 8}, "resnet18": {"width_multiplier": 0.125}}[name]
    given = ENCODERS[name](input_size=16, **small).build(Seed(0))
    made = copied(given)
    redraw(made, (0.0, 1.0), Seed(0))  # all but the last part stay
    last = "backbone.layer3" if name == "fast" else "backbone.layer4"
    for key, value in made.module.state_dict().items():
        weights = value.ndim == 4
        assert torch.equal(value, given.module.state_dict()[key]) == (not (weights and key.startswith(last))), key


def test_temperatures() -> None:
    assert [temperature_at(e, 100) for e in (1, 50, 100)] == pytest.approx([1.03, 2.5, 4.0])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_softened_loss_is_that_of_a_loop(temperature: float) -> None:
    s, t = draw(4, 6), draw(4, 6, seed=1)
    wanted = sum(kl(softmax(b, temperature), softmax(a, temperature)) for a, b in zip(s, t, strict=True)) / 4
    assert float(softened_loss(s, t, temperature)) == pytest.approx(wanted, rel=1e-4)
    assert float(softened_loss(t, t, temperature)) == pytest.approx(0, abs=1e-6)


def test_relational_loss_compares_rows_of_cosines_and_is_blind_to_rotation() -> None:
    s, t = draw(5, 6), draw(5, 6, seed=1)
    u, v = (one / one.norm(dim=1, keepdim=True) for one in (s, t))
    wanted = sum(kl(softmax(v @ v[i], 0.1), softmax(u @ u[i], 0.1)) for i in range(5)) / 5
    assert float(relational_loss(s, t, 0.1)) == pytest.approx(wanted, rel=1e-4)
    rotation, _ = torch.linalg.qr(draw(6, 6, seed=2))
    assert float(relational_loss(t @ rotation, t, 0.1)) == pytest.approx(0, abs=1e-5)
    assert wanted > 0.01


def learner(settings: BCU, encoder: ImageEncoder) -> BCULearner:
    return BCULearner(settings, copied(encoder), features(encoder, DATA, dtype=torch.float32), DATA)


@pytest.mark.parametrize("distance", ["embedding", "relational", "softmax"])
def test_an_unchanged_student_has_no_loss(distance: str) -> None:
    settings = BCU(distance=distance, batch_norm="frozen", batch_size=16, epochs=2)
    loss, numbers = learner(settings, small_encoder()).loss(Batch(DATA.inputs[:16], torch.arange(16), Seed(0)))
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert float(numbers["cosine"]) == pytest.approx(1, abs=1e-5)


def test_the_embedding_distance_is_that_of_a_loop() -> None:
    given = small_encoder()
    one = learner(BCU(batch_norm="eval_affine", batch_size=16, length=0.3), given)
    redraw(one.encoder, [0.5], Seed(0))
    rows = torch.arange(16) + 5
    loss, _ = one.loss(Batch(DATA.inputs[rows], rows, Seed(0)))
    with torch.no_grad():
        s = one.encoder(DATA.inputs[rows].float() / 255)
        t = given(DATA.inputs.float() / 255)
    square = sum(float(row.square().sum()) for row in t) / 64
    wanted = 0.0
    for i in range(16):
        a, b = s[i], t[i + 5]
        wanted += 1 - float(a @ b / a.norm() / b.norm()) + 0.3 * float((a - b).square().sum()) / square
    assert loss.item() == pytest.approx(wanted / 16, rel=1e-3)


def test_the_temperature_rises_with_the_epochs() -> None:
    one = learner(BCU(distance="softmax", batch_norm="frozen", batch_size=16, epochs=3), small_encoder())
    redraw(one.encoder, [0.5], Seed(0))
    batch = Batch(DATA.inputs[:16], torch.arange(16), Seed(0))
    target, student = one.targets[:16], one.encoder(DATA.inputs[:16].float() / 255)
    for step in range(12):
        loss, _ = one.loss(batch)
        wanted = softened_loss(student, target, 1 + (step // 4 + 1))
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
        one.after_step()


def test_distillation_recovers_what_the_drawing_broke() -> None:
    given = trained_encoder(DATA, steps=30)
    clean = features(given, DATA, dtype=torch.float32)

    def agreement(**settings: Any) -> float:
        method = BCU(batch_size=32, scale=2.0, weight_decay=0.0, **settings)
        return metrics.mean_cosine(features(method.purify(given, DATA, Seed(0)), DATA, dtype=torch.float32), clean)

    before, after = agreement(steps=1, lr=1e-9), agreement(steps=60, lr=0.05)
    assert before < 0.8
    assert after > (1 + before) / 2


def test_no_rates_are_refused() -> None:
    with pytest.raises(SettingsError, match="rates"):
        BCU(rates=())
