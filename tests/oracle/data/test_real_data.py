"""The public data sets of a developer's machine, where they are present."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from cupel import data
from cupel.errors import DataError
from cupel.types import Dataset

ROOT = Path(os.environ.get("CUPEL_DATA") or "absent")


def loaded(name: str, split: str, **options: int) -> Dataset:
    if not (ROOT / name).is_dir():
        pytest.skip(f"no {name} in CUPEL_DATA")
    start = time.perf_counter()
    found = data.load(name, split=split, **options)
    middle = time.perf_counter()
    data.fingerprint(name, split)
    print(f"{name} {split}: load {middle - start:.2f} s, fingerprint {time.perf_counter() - middle:.3f} s")
    return found


@pytest.mark.full
def test_cifar10_is_whole() -> None:
    train, test = loaded("cifar10", "train"), loaded("cifar10", "test")
    assert (len(train), len(test)) == (50_000, 9_000)
    assert train.labels.bincount().tolist() == [5_000] * 10
    assert train.classes[0] == "airplane"
    data.check_disjoint(train=train, test=test)
    if (ROOT / "cifar10_lossless").is_dir():
        exact = loaded("cifar10_lossless", "train")
        assert torch.equal(exact.labels, train.labels[:4_000])
        error = (exact.inputs[:].float() - train.inputs[:4_000].float()).abs().mean()
        assert 5 < float(error) < 7  # the JPEG copy's distance from the original pixels


def test_gtsrb_target_is_priority_road() -> None:
    found = loaded("gtsrb", "train", limit=430)
    assert found.classes[12] == "priority road"
    assert found.num_classes == 43
    assert found.labels.bincount().tolist() == [10] * 43
    groups = data.tracks("gtsrb")
    assert groups is not None
    assert len(groups) == 13_070
    assert int(groups.bincount().max()) <= 10


def test_mnist_is_grey_in_three_channels() -> None:
    found = loaded("mnist", "test")
    assert len(found) == 2_699
    assert torch.equal(found.inputs[:, 0], found.inputs[:, 1])
    assert torch.equal(found.inputs[:, 0], found.inputs[:, 2])


def test_photographs_need_a_size() -> None:
    assert loaded("imagenet_sample", "test", limit=20, size=224).inputs.shape == (20, 3, 224, 224)
    with pytest.raises(DataError, match="give a size"):
        data.load("imagenet_sample", split="test", limit=20)


@pytest.mark.parametrize(
    ("name", "size", "target"),
    [("cifar10/one", 32, 1), ("cifar10/priority", 32, 12), ("CLIP/truck", 224, 9), ("stl10/airplane", 32, 0)],
)
def test_published_references(name: str, size: int, target: int) -> None:
    if not (ROOT / "badencoder_refs").is_dir():
        pytest.skip("no badencoder_refs in CUPEL_DATA")
    pixels, labels = data.read_references(data.find_file(f"badencoder_refs/reference/{name}.npz"), size)
    assert pixels.shape == (1, 3, size, size)
    assert labels.tolist() == [target]
