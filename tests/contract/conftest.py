"""A small world for the contracts: 16-pixel images of four classes, an untrained encoder, an attacker."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cupel.encoders import Fast, ImageEncoder
from cupel.seeds import Seed
from cupel.triggers import Patch
from cupel.types import Dataset, Goal, Knowledge

SIDE, ROWS = 16, 64


@pytest.fixture
def images() -> Dataset:
    """64 images; the class sets the mean colour and the place of a bright bar."""
    draw = Seed(1).torch()
    labels = torch.arange(ROWS) % 4
    raw = torch.randint(40, 120, (ROWS, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        raw[row, label % 3] += 60
        raw[row, :, 4 * label : 4 * label + 2] += 70
    return Dataset(raw, labels, 1000 + torch.arange(ROWS), name="bars", classes=("a", "b", "c", "d"))


@pytest.fixture
def encoder() -> ImageEncoder:
    """Untrained, with BatchNorm statistics and affine parts that a careless method would change."""
    made = Fast(width=4, input_size=SIDE).build(Seed(0))
    draw = Seed(2).torch()
    with torch.no_grad():
        for part in made.module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                assert part.running_mean is not None
                part.running_mean.normal_(0, 0.1, generator=draw)
                part.weight.uniform_(0.5, 1.5, generator=draw)
    return made


@pytest.fixture
def attacker(images: Dataset) -> Knowledge:
    """One goal: class 1, a white patch, two references."""
    references = images.subset((images.labels == 1).nonzero().flatten()[:2])
    assert isinstance(references.inputs, torch.Tensor)
    goal = Goal(trigger=Patch(size=4), references=references.inputs, task="bars", target_class=1)
    return Knowledge(goals=(goal,), shadow=images.without_labels("the attacker"), labelled=images)


@pytest.fixture(autouse=True)
def _global_generators_untouched() -> Iterator[None]:
    """Randomness comes from the seed alone: nothing draws from, or seeds, a global generator."""
    before, numbers = torch.get_rng_state(), np.random.get_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(numbers, after, strict=True))
