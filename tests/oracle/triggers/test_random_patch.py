import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.triggers import RandomPatch
from cupel.triggers.draws import uniforms
from cupel.triggers.random_patch import corners

M64 = 2**64


def splitmix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % M64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % M64
    return z ^ (z >> 31)


def test_draws_equal_a_literal_transcription() -> None:
    step, ids = 0x9E3779B97F4A7C15, [0, 1, 2**40, -3]
    got = uniforms(Seed(123), ids, 3)
    for row, one in enumerate(ids):
        base = splitmix((splitmix((123 + step) % M64) + one * step) % M64)
        for k in range(3):
            assert got[row, k] == (splitmix((base + (k + 1) * step) % M64) >> 11) / 2**53


def test_inside_is_the_picture_and_outside_is_unchanged() -> None:
    x = torch.randint(0, 256, (50, 3, 30, 40), dtype=torch.uint8, generator=Seed(1).torch())
    before = x.clone()
    trigger = RandomPatch(size=7, pattern_seed=2)
    ids = list(range(100, 150))
    y = trigger(x, ids, Seed(5))
    assert torch.equal(x, before)
    places = corners(30, 40, 7, 0.25, 0.75, ids, Seed(5))
    assert len({tuple(place) for place in places}) > 20
    for i, (top, left) in enumerate(places):
        expected = x[i].clone()
        expected[:, top : top + 7, left : left + 7] = trigger.picture()
        assert torch.equal(y[i], expected)


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.75), (0.10, 0.90)])
def test_places_stay_in_the_band_and_are_uniform(low: float, high: float) -> None:
    n, height, width, size = 10_000, 30, 40, 8
    places = corners(height, width, size, low, high, range(n), Seed(0))
    for axis, side in enumerate((height, width)):
        first, last = int(np.ceil(low * side - 1e-9)), int(np.floor(high * side + 1e-9)) - size
        assert places[:, axis].min() == first
        assert places[:, axis].max() == last
        counts = np.bincount(places[:, axis] - first, minlength=last - first + 1)
        assert stats.chisquare(counts).pvalue > 0.01
    # rows and columns are independent
    table = np.histogram2d(places[:, 0], places[:, 1], bins=4)[0]
    assert stats.chi2_contingency(table).pvalue > 0.01


def test_the_place_depends_on_seed_and_id_alone() -> None:
    x = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    trigger, ids = RandomPatch(), [4, 8, 15, 16, 23, 42]
    y = trigger(x, ids, Seed(1))
    assert torch.equal(y, trigger(x, ids, Seed(1)))
    assert torch.equal(y.flip(0), trigger(x, ids[::-1], Seed(1)))
    assert torch.equal(y[2:3], trigger(x[:1], [15], Seed(1)))
    assert not torch.equal(y, trigger(x, ids, Seed(2)))
    a, b = (corners(32, 32, 8, 0.1, 0.9, range(2000), Seed(s))[:, 0] for s in (1, 2))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.08
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.08  # neighbouring ids


def test_images_narrower_than_two_patches_are_refused() -> None:
    trigger = RandomPatch(size=8)
    x = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert corners(16, 16, 8, 0.25, 0.75, [0], Seed(0)).tolist() == [[4, 4]]
    assert trigger(x, [0], Seed(0)).shape == x.shape
    with pytest.raises(UsageError, match=r"8 px does not fit into the band 0.25–0.75 of images of 16 × 15 px"):
        trigger(x[..., :15], [0], Seed(0))
    with pytest.raises(UsageError, match="9 px does not fit"):
        dataclasses.replace(trigger, size=9)(x, [0], Seed(0))


def test_pictures_are_colourful_and_the_band_may_not_be_empty() -> None:
    picture = RandomPatch(size=50).picture()
    assert picture.shape == (3, 50, 50)
    assert picture.float().std(dim=(1, 2)).min() > 20
    assert not torch.equal(picture, RandomPatch(size=50, pattern_seed=1).picture())
    assert RandomPatch().mask_and_pattern(32) is None
    with pytest.raises(UsageError):
        RandomPatch(low=0.9, high=0.1)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [0], Seed(0))
