"""Reach: closed forms, the planted toy, where the backdoor is known, and what a measurement must leave alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.errors import DataError, SettingsError
from cupel.inference import features
from cupel.losses.pulling import EmbeddingScale, whitened_pull
from cupel.purify.cbd import CBD
from cupel.purify.reach import Reach, Reached, centroid, climbing_blends, reach
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import Evidence
from planted import Planted, planted, unit
from toys import blobs, small_encoder

QUICK = Reach(
    epsilons=(8, 51), images=64, batch_size=32, universal_rounds=2, blend_steps=10, cbd=CBD(pgd_steps=5)
)  # fmt: skip
STILL = dataclasses.replace(QUICK, cbd=CBD(pgd_steps=5, boost=(1.0, 1.0), shift=0, dilation=0))


@pytest.fixture(scope="module")
def toy() -> Planted:
    return planted(40, 0.9, seed=0)


def stamped(toy: Planted) -> Dataset:
    hit = toy.stamp(unit(torch.as_tensor(toy.images.inputs))).mul(255).round().to(torch.uint8)
    return toy.images.with_inputs(hit, "triggered")


def truth(toy: Planted) -> Evidence:
    mask = (0.9 * toy.mask).numpy()
    return Evidence(mask, toy.pattern.numpy(), float(mask.mean()), True, "truth")


def test_the_centroid_is_a_direction_whatever_the_lengths() -> None:
    h = torch.tensor([[4.0, 0.0], [0.0, 0.25]])
    torch.testing.assert_close(centroid(h), torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(centroid(h * torch.tensor([[7.0], [0.1]])), centroid(h))
    torch.testing.assert_close(reach(h, centroid(h)), torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(reach(-h, centroid(h)), -torch.tensor([0.5, 0.5]).sqrt())


def test_a_stand_in_that_is_the_triggered_image_reaches_it() -> None:
    clean, there = torch.eye(3), torch.tensor([[0.0, 0.0, 2.0]]).expand(3, 3)
    half = F.normalize(clean[:1] + there[:1] / 2, dim=1).expand(3, 3)  # between image 0 and the trigger's place
    numbers = Reached({"clean": clean, "triggered": there, "same": there.clone(), "half": half}).numbers()
    assert numbers["same"] == numbers["triggered"]
    assert numbers["same"] == pytest.approx({"reach": 1.0, "inside": 1.0, "moved": 2 / 3, "centred": 1.0})
    assert numbers["clean"] == pytest.approx({"reach": 1 / 3, "inside": 1 / 3, "moved": 0.0, "centred": 0.0}, abs=1e-6)
    assert numbers["half"]["reach"] == pytest.approx(0.5**0.5)
    assert numbers["half"]["inside"] == 0.0


def test_the_edge_of_the_heap_holds_95_of_100_triggered_images() -> None:
    angle = torch.linspace(-0.5, 0.5, 201)
    there = torch.stack([angle.cos(), angle.sin()], dim=1)
    away = torch.tensor([[0.0, 1.0]]).expand(201, 2)
    numbers = Reached({"clean": away, "triggered": there}).numbers()
    assert numbers["triggered"]["inside"] == pytest.approx(0.95, abs=0.01)
    assert numbers["triggered"]["reach"] == pytest.approx(2 * torch.sin(torch.tensor(0.5)).item(), abs=2e-3)


def test_only_the_true_trigger_reaches_the_planted_backdoor(toy: Planted) -> None:
    """The gate is shut around clean images, so its gradient is nought: ascent does not find the way in."""
    numbers = STILL.measure(toy.encoder, toy.images, stamped(toy), Seed(0), [truth(toy)]).numbers()
    names = ["clean", "triggered", "linf-8", "linf-51", "patch", "universal", "inverted", "blends"]
    assert list(numbers) == names
    assert min(numbers["triggered"]["reach"], numbers["inverted"]["reach"]) > 0.95
    assert numbers["triggered"]["moved"] > 0.9
    for name in ("clean", "linf-8", "linf-51", "universal"):
        assert numbers[name]["reach"] < 0.3, name
        assert numbers[name]["inside"] == 0.0, name
    assert numbers["clean"]["moved"] == pytest.approx(0.0, abs=1e-6)
    assert numbers["linf-51"]["moved"] > numbers["linf-8"]["moved"] > 0.01


def test_a_shifted_trigger_reaches_what_is_bound_to_a_place_only_now_and_then(toy: Planted) -> None:
    """By default evidence is moved and grown at random; the gate opens for the images where it stays in its place."""
    own = features(toy.encoder, torch.as_tensor(toy.images.inputs)[:64], dtype=torch.float32)
    made = QUICK.stand_ins(toy.encoder, torch.as_tensor(toy.images.inputs)[:64], own, Seed(0), [truth(toy)])["inverted"]
    with torch.no_grad():
        there = centroid(toy.encoder(toy.stamp(unit(torch.as_tensor(toy.images.inputs)))))
        is_open = toy.encoder.module.gate(made) > 0.5
        near = reach(toy.encoder(made), there) > 0.9
    assert 0 < int(is_open.sum()) < 32
    assert torch.equal(near, is_open)


def test_without_evidence_there_is_nothing_inverted(toy: Planted) -> None:
    failed = dataclasses.replace(truth(toy), converged=False)
    bare = dataclasses.replace(QUICK, blend_steps=0)
    for evidence in ([], [failed]):
        found = bare.measure(toy.encoder, toy.images, stamped(toy), Seed(0), evidence).embeddings
        assert list(found) == ["clean", "triggered", "linf-8", "linf-51", "patch", "universal"]


def test_stand_ins_stay_in_their_bounds_and_move_further_the_larger_the_ball() -> None:
    encoder, data = small_encoder(), blobs(64)
    own = features(encoder, data, dtype=torch.float32)
    x = unit(torch.as_tensor(data.inputs))
    images = QUICK.stand_ins(encoder, torch.as_tensor(data.inputs), own, Seed(1))
    for name, radius in (("linf-8", 8), ("linf-51", 51), ("universal", 51)):
        assert float((images[name] - x).abs().max()) <= radius / 255 + 1e-6, name
    assert float((images["patch"] != x).any(dim=1).float().mean()) <= 0.2**2 + 1e-3
    assert float((images["blends"] - x).abs().max()) <= 0.3 + 1e-6
    for name, one in images.items():
        assert one.shape == x.shape, name
        assert 0 <= float(one.min()) <= float(one.max()) <= 1, name

    def moved(name: str) -> float:
        return float((1 - F.cosine_similarity(features(encoder, images[name], dtype=torch.float32), own)).mean())

    assert moved("linf-51") > 2 * moved("linf-8") > 0


def test_blends_climb() -> None:
    encoder, data = small_encoder(), blobs(64)
    own, x = features(encoder, data, dtype=torch.float32), unit(torch.as_tensor(data.inputs))

    def distance(steps: int) -> float:
        h = features(encoder, climbing_blends(encoder, x, own, steps, Seed(2), batch_size=32), dtype=torch.float32)
        return float(whitened_pull(h, own, EmbeddingScale.of(own)))

    assert distance(20) > 1.05 * distance(0)


def test_labels_are_not_read_and_the_encoder_stays() -> None:
    encoder, data = small_encoder(), blobs(64)
    encoder.module.train().requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    hit = data.with_inputs(torch.as_tensor(data.inputs).flip(1), "triggered")
    small = Reach(epsilons=(8,), images=16, batch_size=8, universal_rounds=1, blend_steps=2, cbd=CBD(pgd_steps=2))
    small.measure(encoder, data.without_labels("reach"), hit.without_labels("reach"), Seed(0))
    after: dict[str, Tensor] = encoder.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert encoder.module.training
    assert not any(weight.requires_grad or weight.grad is not None for weight in encoder.module.parameters())


def test_the_seed_decides(toy: Planted) -> None:
    small = Reach(epsilons=(8,), images=16, batch_size=8, universal_rounds=1, blend_steps=1, cbd=CBD(pgd_steps=1))
    hit = stamped(toy)
    a, b, c = (small.measure(toy.encoder, toy.images, hit, Seed(seed)).embeddings for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], c[name]) for name in a)


def test_settings_and_data_that_do_not_fit(toy: Planted) -> None:
    with pytest.raises(SettingsError, match="none of epsilons"):
        Reach(epsilons=(4, 16))
    with pytest.raises(SettingsError, match="is empty"):
        Reach(epsilons=())
    with pytest.raises(DataError, match="16 triggered images beside 256 clean ones"):
        Reach().measure(toy.encoder, toy.images, stamped(toy).subset(torch.arange(16)), Seed(0))
    one = toy.images.subset(torch.arange(1))
    with pytest.raises(DataError, match="fewer than two"):
        Reach().measure(toy.encoder, one, one, Seed(0))
