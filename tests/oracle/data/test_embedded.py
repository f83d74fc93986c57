"""The embedded data: digits without leaks; shapes that depend on (seed, image) alone and hide their class."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from cupel import data
from cupel.data import shapes
from cupel.errors import UsageError
from cupel.seeds import Seed


def test_digits_splits() -> None:
    train, test = data.load("digits"), data.load("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert test.labels.bincount().tolist() == [36] * 10
    assert train.inputs.shape[1:] == (3, 16, 16)
    data.check_disjoint(train=train, test=test)
    assert len(set(train.content())) == 1437
    assert torch.equal(train.inputs[:, 0], train.inputs[:, 1])
    assert int(train.inputs[:].max()) == 255
    assert data.load("digits", seed=Seed(9)).sha256 == train.sha256


def test_digits_are_the_ones_of_scikit_learn() -> None:
    """Enlarging by two and averaging back gives the 8 x 8 picture, up to the smoothing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    small = torch.nn.functional.avg_pool2d(data.load("digits", split="test").inputs[:, 0].float(), 2) / 255 * 16
    far = torch.cdist(small.flatten(1), torch.from_numpy(raw.images).float().flatten(1))
    assert (raw.target[far.argmin(1).numpy()] == data.load("digits", split="test").labels.numpy()).mean() > 0.98


def test_shape_is_a_function_of_seed_and_id() -> None:
    whole, masks = shapes.render(60, 32, Seed(4))
    part, part_masks = shapes.render(23, 32, Seed(4))
    assert torch.equal(whole.inputs[:23], part.inputs[:23])
    assert torch.equal(masks[:23], part_masks)
    other, _ = shapes.render(60, 32, Seed(5))
    assert (whole.inputs[:] != other.inputs[:]).float().mean() > 0.9
    assert len(set(whole.content())) == 60


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = shapes.render(40, 16)
    monkeypatch.setattr(shapes, "_CHUNK", 16 * 16 * 7)
    assert torch.equal(whole.inputs[:], shapes.render(40, 16)[0].inputs[:])


def test_size_changes_the_sampling_not_the_scene() -> None:
    _, small = shapes.render(50, 32)
    _, large = shapes.render(50, 96)
    shrunk = torch.nn.functional.avg_pool2d(large.float(), 3) >= 0.5
    assert (shrunk != small).float().mean() < 0.01


def test_masks_lie_on_the_object() -> None:
    """Where mask and ground are told apart by the mask, colours differ; every object is inside and of fair size."""
    found, masks = shapes.render(500, 32)
    area = masks.flatten(1).float().mean(1)
    assert float(area.min()) > 0.01
    assert float(area.max()) < 0.45
    pixels = found.inputs[:].float()
    inside = (pixels * masks[:, None]).sum((2, 3)) / masks.sum((1, 2))[:, None]
    outside = (pixels * ~masks[:, None]).sum((2, 3)) / (~masks).sum((1, 2))[:, None]
    assert float(((inside - outside).abs().amax(1) > 30).float().mean()) > 0.98


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_distances_are_signed_distances(name: str) -> None:
    """Near the edge the distance grows by one per unit of length, so the edge is blurred by one pixel and no more."""
    axis = np.linspace(-1.2, 1.2, 961, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    d = shapes.SHAPES[name](x, y)
    slope = np.hypot(*np.gradient(d, axis, axis))
    near = np.abs(d) < 0.02
    assert near.sum() > 1000
    assert np.median(np.abs(slope[near] - 1)) < 0.02
    assert np.abs(slope[near] - 1).mean() < 0.06
    inside = d < 0
    assert 0.15 < inside.mean() * 2.4**2 / 4 < 0.65  # share of the square [−1, 1]²
    assert np.hypot(x, y)[inside].max() < 1.15


def test_areas_have_their_closed_form() -> None:
    axis = np.linspace(-1.5, 1.5, 1501, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    area = {name: float((signed(x, y) < 0).mean() * 9) for name, signed in shapes.SHAPES.items()}
    assert area["disk"] == pytest.approx(np.pi * 0.85**2, rel=0.01)
    assert area["ring"] == pytest.approx(np.pi * (0.9**2 - 0.5**2), rel=0.01)
    assert area["square"] == pytest.approx(1.5**2, rel=0.01)
    assert area["frame"] == pytest.approx(1.6**2 - 0.84**2, rel=0.01)
    assert area["plus"] == pytest.approx(2 * 1.8 * 0.52 - 0.52**2, rel=0.01)
    assert area["cross"] == pytest.approx(area["plus"], rel=0.01)
    assert area["bars"] == pytest.approx(2 * 1.7 * 0.46, rel=0.01)
    assert area["star"] == pytest.approx(5 * 0.42 * np.sin(np.pi / 5), rel=0.01)


def test_load_gives_fixed_splits_and_a_prefix() -> None:
    test = data.load("shapes", split="test", limit=50)
    assert torch.equal(test.inputs[:], data.load("shapes", split="test", limit=100, seed=Seed(8)).inputs[:50])
    assert test.labels.bincount().tolist() == [5] * 10
    assert len(test.classes) == 10
    assert not set(test.content()) & set(data.load("shapes", limit=50).content())
    assert data.load("shapes", limit=4, size=20).inputs.shape == (4, 3, 20, 20)


def test_pixels_do_not_give_the_class_away() -> None:
    start = time.perf_counter()
    train, test = data.load("shapes", limit=4000), data.load("shapes", split="test", limit=500)
    print(f"4,500 shapes: {time.perf_counter() - start:.2f} s")
    near = torch.cdist(test.inputs[:].float().flatten(1), train.inputs[:].float().flatten(1)).topk(5, largest=False)
    accuracy = (train.labels[near.indices].mode(1).values == test.labels).float().mean()
    assert 0.1 < float(accuracy) < 0.45


@pytest.mark.parametrize(("n", "size"), [(0, 32), (1, 7)])
def test_too_small(n: int, size: int) -> None:
    with pytest.raises(UsageError, match="cannot render"):
        shapes.render(n, size)
