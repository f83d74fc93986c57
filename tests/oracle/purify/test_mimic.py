"""MIMIC: attention and its weights in closed form, mutual information of Gaussians, the loss against loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cupel.encoders import Fast, ImageEncoder
from cupel.errors import SettingsError
from cupel.protocols import Batch
from cupel.purify.base import copied
from cupel.purify.mimic import MIMIC, MIMICLearner, attention, attention_distance, stage_weights
from cupel.purify.mine import donsker_varadhan, mutual_information
from cupel.purify.unlabelled import fresh_copy
from cupel.seeds import Seed
from toys import blobs, small_encoder

DATA = blobs(64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attention_is_that_of_a_loop() -> None:
    a, b = draw(2, 3, 4, 4), draw(2, 5, 4, 4, seed=1)
    wanted = 0.0
    for i in range(2):
        seen = []
        for maps in (a[i], b[i]):
            energy = [sum(float(v) ** 2 for v in maps[:, y, x]) for y in range(4) for x in range(4)]
            length = math.sqrt(sum(e * e for e in energy))
            seen.append([e / length for e in energy])
        wanted += sum((p - q) ** 2 for p, q in zip(*seen, strict=True)) / 32
    assert float(attention_distance(a, b)) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(attention(a).norm(dim=1), torch.ones(2))


def test_attention_is_blind_to_scale_and_to_the_order_of_channels() -> None:
    a = draw(2, 6, 3, 3)
    assert float(attention_distance(a, a)) == 0
    assert float(attention_distance(a, -7.5 * a.flip(1))) == pytest.approx(0, abs=1e-12)


def test_weights_of_the_stages() -> None:
    assert sum(stage_weights([0.1, 0.7, 0.3, 2.0])) == pytest.approx(4 * 1000 + 10000)
    assert stage_weights([0.1, 0.3, -4.0, 0.0]) == pytest.approx([3500, 8500, 1000, 1000])
    assert stage_weights([0.0, -1.0, 0.0, 0.0]) == [3500.0] * 4


def test_the_bound_is_that_of_a_loop() -> None:
    joint, shuffled = draw(5), draw(7, seed=1)
    wanted = sum(joint.tolist()) / 5 - math.log(sum(math.exp(v) for v in shuffled.tolist()) / 7)
    assert float(donsker_varadhan(joint, shuffled)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("rho", "wanted"), [(0.8, -0.5 * math.log(1 - 0.64)), (0.0, 0.0)])
def test_mutual_information_of_gaussians(rho: float, wanted: float) -> None:
    a, noise = draw(4000, 1), draw(4000, 1, seed=1)
    b = rho * a + math.sqrt(1 - rho**2) * noise
    assert mutual_information(5 * a + 3, b, Seed(0), steps=250) == pytest.approx(wanted, abs=0.1)


def learner(settings: MIMIC, weights: list[float]) -> tuple[MIMICLearner, ImageEncoder, ImageEncoder]:
    given = small_encoder(0)
    given.module.requires_grad_(False)
    student = copied(small_encoder(1))
    assert isinstance(student, ImageEncoder)
    return MIMICLearner(settings, student, given, weights, Seed(0)), student, given


def stages(encoder: ImageEncoder, x: Tensor) -> list[Tensor]:
    """Outputs of the three residual stages, by hand."""
    net = encoder.module.backbone
    h = net.relu(net.bn1(net.conv1((x - 0.5) / 0.25)))
    made = []
    for layer in (net.layer1, net.layer2, net.layer3):
        h = layer(h)
        made.append(h)
    return made


def test_the_loss_is_that_of_a_loop() -> None:
    settings = MIMIC(batch_norm="frozen", contrastive=0.6, clone=1.7, temperature=0.3)
    weights = [3.0, 5.0, 11.0]
    one, student, given = learner(settings, weights)
    b = Batch(DATA.inputs[:8], torch.arange(8), Seed(2))
    loss, numbers = one.loss(b)
    x = b.inputs.float() / 255
    views = settings.augment(b.inputs.repeat(2, 1, 1, 1), b.seed.child("views").torch())
    with torch.no_grad():
        z = one.projector(student(views))
        h, t = student(x), given(x)
        told = sum(w * attention_distance(p, q) for w, p, q in
                   zip(weights, stages(student, x), stages(given, x), strict=True))  # fmt: skip
    u = z / z.norm(dim=1, keepdim=True)
    contrast = 0.0
    for i in range(16):
        alike = [math.exp(float(u[i] @ u[k]) / 0.3) for k in range(16)]
        contrast -= math.log(alike[(i + 8) % 16] / (sum(alike) - alike[i])) / 16
    clone = -sum(float(h[i] @ t[i] / h[i].norm() / t[i].norm()) for i in range(8)) / 8
    assert float(numbers["contrastive"]) == pytest.approx(contrast, rel=1e-4)
    assert float(numbers["cosine"]) == pytest.approx(-clone, rel=1e-4)
    assert float(numbers["attention"]) == pytest.approx(float(told), rel=1e-3)
    assert loss.item() == pytest.approx(0.6 * contrast + 1.7 * clone + float(told), rel=1e-3)


def test_information_is_taken_of_every_stage_of_the_encoder() -> None:
    quick = MIMIC(information_steps=40)
    found = quick.information(small_encoder(), DATA, Seed(0))
    assert len(found) == 3
    assert found == quick.information(small_encoder(), DATA, Seed(0))
    assert MIMIC(information_steps=0).information(small_encoder(), DATA, Seed(0)) == [0.0] * 3


def test_a_fresh_copy_remembers_nothing_and_leaves_the_global_generator() -> None:
    given = Fast(width=4, input_size=16).build(Seed(0))
    with torch.no_grad():
        for part in given.module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.fill_(3.0)
                part.get_buffer("running_mean").fill_(2.0)
    state = torch.get_rng_state()
    fresh, again, other = (fresh_copy(given, Seed(s)).module for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))
    assert not torch.equal(fresh.backbone.conv1.weight, other.backbone.conv1.weight)
    assert not torch.equal(fresh.backbone.conv1.weight, given.module.backbone.conv1.weight)
    assert float(fresh.backbone.bn1.weight.detach().mean()) == 1
    assert float(fresh.backbone.bn1.running_mean.abs().max()) == 0


@pytest.mark.parametrize("start", ["random", "partial"])
def test_the_student_comes_nearer_to_the_encoder(start: Any) -> None:
    method = MIMIC(start=start, steps=25, batch_size=32, lr=3e-3, information_steps=0)
    _, history = method.purify_with_history(small_encoder(), DATA.without_labels("mimic"), Seed(0))
    assert history["attention"][-1] < 0.7 * history["attention"][0]
    assert history["cosine"][-1] > history["cosine"][0]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="information_steps"):
        MIMIC(information_steps=-1)
