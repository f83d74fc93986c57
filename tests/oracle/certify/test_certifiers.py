"""PatchGuard and Mask-DS on encoders: what cells see, what a patch can touch, training, and certificates that hold."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cupel.certify import CERTIFIERS, Certificate, MaskDS, MaskedClassifier, PatchGuard, certified_accuracy, measure
from cupel.certify.local_net import local_net
from cupel.certify.mask_ds import banded
from cupel.certify.masking import CERTIFIED
from cupel.certify.patchguard import masked_logits
from cupel.certify.windows import receptive_field, squares
from cupel.errors import DataError, SettingsError, UsageError
from cupel.inference import triggered
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Dataset
from fingerprints import model_print
from toys import blobs, trained_encoder

TRAIN, TEST = blobs(192, classes=3, seed=1), blobs(64, classes=3, seed=2)  # the colour tells, not the place
QUICK: dict[str, Any] = {"patch": 2, "width": 8, "steps": 40, "head_epochs": 12, "batch_size": 32}


@pytest.fixture(scope="module")
def guarded() -> dict[str, MaskedClassifier]:
    encoder = trained_encoder(TRAIN, steps=40)
    before = model_print(encoder.module)
    made = {
        "patchguard": PatchGuard(**QUICK, kernels=(3, 1), strides=(2, 1)).fit(encoder, TRAIN, Seed(0)),
        "mask_ds": MaskDS(patch=2, band=3, training_bands=4).fit(encoder, TRAIN, Seed(0)),
    }
    assert model_print(encoder.module) == before
    return made


def with_patch(data: Dataset, side: int, seed: int) -> Dataset:
    """A square of random content at a random place of each image."""
    g = torch.Generator().manual_seed(seed)
    assert isinstance(data.inputs, Tensor)
    pixels = data.inputs.clone()
    for image in pixels:
        top, left = torch.randint(0, 16 - side + 1, (2,), generator=g).tolist()
        plain = torch.randint(0, 2, (3, 1, 1), generator=g) * 255
        content = torch.randint(0, 256, (3, side, side), generator=g)
        chosen = plain.expand_as(content) if int(content[0, 0, 0]) % 2 else content
        image[:, top : top + side, left : left + side] = chosen.to(torch.uint8)
    return data.with_inputs(pixels, "patched")


@pytest.mark.parametrize(
    ("kernels", "strides"), [((3, 3, 1), (1, 2, 1)), ((3, 1), (2, 1)), ((5, 3, 3), (1, 1, 2)), ((1, 1), (1, 1))]
)
def test_a_patch_touches_no_more_than_one_window(kernels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    net = local_net(4, 6, kernels, strides, Seed(0)).eval()
    field, stride = receptive_field(kernels, strides)
    guard = PatchGuard(patch=3, kernels=kernels, strides=strides)
    windows = guard.windows(16)
    x = torch.rand(1, 3, 16, 16, generator=Seed(1).torch())
    with torch.no_grad():
        before = net(x)
        assert before.shape[2:] == windows.shape == (-(-16 // stride),) * 2
        widest = 0
        for top in range(14):
            for left in range(14):
                changed = x.clone()
                changed[:, :, top : top + 3, left : left + 3] = torch.rand(3, 3, 3, generator=Seed(2).torch())
                touched = (net(changed) != before).any(dim=1).flatten()
                assert bool((touched <= windows.covers).all(dim=1).any()), (top, left)
                widest = max(widest, int(touched.view(windows.shape).any(0).sum()))
    assert widest <= windows.size
    assert widest >= windows.size - 1 or field > 9  # the window is not larger than it must be


def test_bands_are_cut_around_the_edge() -> None:
    x = torch.rand(2, 3, 16, 16)
    for start in range(16):
        seen = banded(x, start, 3, 0.5)
        columns = [(start + i) % 16 for i in range(3)]
        others = [c for c in range(16) if c not in columns]
        assert torch.equal(seen[..., columns], x[..., columns])
        assert bool((seen[..., others] == 0.5).all())


def test_masked_logits_are_those_of_a_loop() -> None:
    e, y = torch.rand(5, 9, 3, generator=Seed(0).torch()), torch.tensor([0, 1, 2, 1, 0])
    windows = squares(3, 3, 2)
    found = masked_logits(e, y, windows)
    for i in range(5):
        for k in range(3):
            total = sum(e[i, c, k].item() for c in range(9))
            if k == y[i]:
                total -= max(sum(e[i, c, k].item() for c in row.nonzero().flatten()) for row in windows.covers)
            assert found[i, k].item() == pytest.approx(total / 9, rel=1e-5)


@pytest.mark.parametrize("name", ["patchguard", "mask_ds"])
def test_what_is_certified_stands_under_patches(name: str, guarded: dict[str, MaskedClassifier]) -> None:
    classifier = guarded[name]
    certificate = certified_accuracy(classifier, TEST)
    sure = certificate.outcomes == CERTIFIED
    right = classifier.predict(TEST) == TEST.labels
    assert torch.equal(certificate.outcomes > 0, right)
    assert certificate.correct == (int(right.sum()), 64)
    assert certificate.certified[0] <= certificate.correct[0]
    for seed in range(4):
        hit = classifier.predict(with_patch(TEST, classifier.patch, seed))
        assert bool((hit == TEST.labels)[sure].all())
    assert certificate.to_json()["window"] == classifier.windows.size


def test_patchguard_learns_and_certifies_something(guarded: dict[str, MaskedClassifier]) -> None:
    found = measure(guarded["patchguard"], TEST, triggered(TEST, Patch(size=2), Seed(0)), target_class=1)
    assert set(found) == {"clean_accuracy", "certified_accuracy", "attack_success_rate", "robust_accuracy"}
    assert found["clean_accuracy"][0] >= 38  # by chance 21
    assert found["certified_accuracy"][0] >= 12
    assert found["attack_success_rate"][1] == found["robust_accuracy"][1] == 43


def test_counts_are_explicit_where_an_outcome_is_missing() -> None:
    for outcomes, correct, certified in ([[2, 2], 2, 2], [[0, 0], 0, 0], [[1, 1], 2, 0], [[0, 2], 1, 1]):
        one = Certificate(torch.tensor(outcomes), 2, 3, 0.0, "patchguard")
        assert (one.correct, one.certified) == ((correct, 2), (certified, 2))


def test_fits_repeat_themselves() -> None:
    encoder = trained_encoder(TRAIN, steps=5)
    method = PatchGuard(**{**QUICK, "steps": 3, "head_epochs": 1})
    a, b, c = (method.fit(encoder, TRAIN, Seed(s)).evidence(TEST) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert float(a.min()) >= 0


def test_wrong_settings_and_data_are_refused(guarded: dict[str, MaskedClassifier]) -> None:
    assert set(CERTIFIERS) >= {"patchguard", "mask_ds"}
    encoder = trained_encoder(TRAIN, steps=1)
    with pytest.raises(SettingsError, match="leaves nothing"):
        PatchGuard(patch=14).fit(encoder, TRAIN, Seed(0))
    with pytest.raises(SettingsError, match="nothing to decide by"):
        MaskDS(patch=14, band=4).fit(encoder, TRAIN, Seed(0))
    with pytest.raises(SettingsError, match="even"):
        PatchGuard(kernels=(2, 1), strides=(1, 1))
    with pytest.raises(SettingsError, match="kernels"):
        PatchGuard(kernels=(3,), strides=(1, 1))
    with pytest.raises(DataError, match="32×32"):
        guarded["patchguard"].evidence(blobs(4, size=32))
    with pytest.raises(DataError, match="no label"):
        certified_accuracy(guarded["patchguard"], Dataset(TEST.inputs, torch.full((64,), -1), torch.arange(64)))
    for cls in (PatchGuard, MaskDS):
        assert cls.preset("smoke") == cls.preset("smoke")
        with pytest.raises(UsageError, match="unknown"):
            cls.preset("larger")
