"""The perturbations stay where they may be, climb, and leave the weights alone; boosted triggers are what they say."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cupel.losses.pulling import info_nce
from cupel.purify.adversaries import (
    Search,
    applied,
    ascend,
    boosted,
    joined,
    linf_search,
    patch_search,
    shared_search,
    windows,
)

EPS = 8 / 255


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 8, side: int = 16, seed: int = 0) -> Tensor:
    x = torch.rand(n, 3, side, side, generator=generator(seed))
    x[0], x[1] = 0.0, 1.0  # the box's corners
    return x


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1),
            nn.Flatten(), nn.Linear(64, 16),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("steps", range(5))
def test_linf_stays_in_the_ball_and_in_the_image_after_every_step(steps: int) -> None:
    x, net = images(), network(0)
    search = linf_search(x, EPS, 4 / 255, generator())
    v = ascend(lambda p: net(p).square().sum(), x, search, steps)
    assert float(v.abs().max()) <= EPS + 1e-7
    assert float((x + v).min()) >= 0
    assert float((x + v).max()) <= 1
    torch.testing.assert_close(applied(x, search, v), x + v)
    assert float(v.abs().amax(dim=(1, 2, 3)).min()) > 0.9 * EPS  # the ball is used


@pytest.mark.parametrize("num_patches", [None, 2])
def test_patches_change_nothing_outside_their_windows(num_patches: int | None) -> None:
    x, net = images(6), network(0)
    search = patch_search(x, (0.1, 0.3), 0.25, num_patches, generator())
    adversaries = applied(x, search, ascend(lambda p: net(p).square().sum(), x, search, 3))
    assert 0 <= float(adversaries.min()) <= float(adversaries.max()) <= 1
    inside = (search.keep == 0).expand_as(x)
    assert torch.equal(adversaries[~inside], x[~inside])
    for i in range(6):
        rows, columns = (search.keep[i, 0] == 0).nonzero().unbind(1)
        side = int(rows.max() - rows.min()) + 1
        assert side == int(columns.max() - columns.min()) + 1
        assert len(rows) == side * side
        assert 2 <= side <= 5  # 1.6 … 4.8 pixels
    if num_patches == 2:  # dealt in turn: images 0, 2, 4 wear the same patch
        assert torch.equal(search.keep[0], search.keep[4])
        assert torch.equal(adversaries[0][inside[0]], adversaries[4][inside[4]])
        assert not torch.equal(search.keep[0], search.keep[1])


def test_windows_reach_every_place_and_side() -> None:
    found = windows(4000, 8, 12, (0.25, 0.5), generator()).float()
    assert set(found.sum(dim=(1, 2)).tolist()) == {4.0, 9.0, 16.0}
    share = found.mean(dim=0)
    assert float(share.min()) > 0
    torch.testing.assert_close(share, share.flip(0, 1), atol=0.04, rtol=0)


def test_a_shared_perturbation_goes_on_from_where_it_was() -> None:
    x, net = images(5), network(1)
    before = torch.full((3, 16, 16), 0.5 * EPS)
    search = shared_search(x, before, EPS, EPS / 4)
    assert len(search.start) == 1
    assert torch.equal(search.start[0], before)
    v = ascend(lambda p: net(p).square().sum(), x, search, 1)
    assert float((v[0] - before).abs().max()) == pytest.approx(EPS / 4, abs=1e-7)
    adversaries = applied(x, search, v)
    torch.testing.assert_close(adversaries[2], (x[2] + v[0]).clamp(0, 1))


def test_joined_searches_are_each_what_they_are_alone() -> None:
    x, net = images(9), network(2)
    parts = x.split([3, 4, 2])
    searches = [
        shared_search(parts[0], torch.zeros(3, 16, 16), EPS, EPS),
        patch_search(parts[1], (0.2, 0.2), 0.25, 2, generator()),
        linf_search(parts[2], EPS, EPS, generator(1)),
    ]

    def objective(p: Tensor) -> Tensor:
        return net(p).square().sum()  # no image's gradient depends on another image

    together = joined(searches)
    assert isinstance(together, Search)
    alone = [applied(x_, s, ascend(objective, x_, s, 4)) for x_, s in zip(parts, searches, strict=True)]
    torch.testing.assert_close(applied(x, together, ascend(objective, x, together, 4)), torch.cat(alone))


def test_ascent_enlarges_the_contrastive_loss() -> None:
    climbed = 0
    for seed in range(20):
        net, x = network(seed), images(seed=seed)
        with torch.no_grad():
            keys = net(x)
        objective = lambda p, net=net, keys=keys: info_nce(net(p), keys, torch.arange(len(keys)))
        search = linf_search(x, EPS, 2 / 255, generator(seed))
        with torch.no_grad():
            before = objective(applied(x, search, search.start))
        v = ascend(objective, x, search, 10)
        climbed += int(objective(applied(x, search, v)) >= before)
    assert climbed >= 19


def test_no_gradient_reaches_weights_or_keys() -> None:
    net, x = network(0), images()
    keys = net(x).detach().requires_grad_(True)
    search = linf_search(x, EPS, 2 / 255, generator())
    v = ascend(lambda p: info_nce(net(p), keys, torch.arange(len(x))), x, search, 3)
    assert not v.requires_grad
    assert all(weight.grad is None for weight in net.parameters())
    assert keys.grad is None
    assert all(weight.requires_grad for weight in net.parameters())


def test_ascent_works_inside_no_grad_and_with_no_steps() -> None:
    net, x = network(0), images()
    search = linf_search(x, EPS, 2 / 255, generator())
    with torch.no_grad():
        assert not torch.equal(ascend(lambda p: net(p).sum(), x, search, 1), search.start)
    assert torch.equal(ascend(lambda p: net(p).sum(), x, search, 0), search.start)


def plain_boost(
    mask: np.ndarray, pattern: np.ndarray, a: float, grow: int, dy: int, dx: int
) -> tuple[np.ndarray, np.ndarray]:
    height, width = mask.shape
    m, p = np.zeros_like(mask), np.zeros_like(pattern)
    for i in range(height):
        for j in range(width):
            y, x = i + dy, j + dx
            if 0 <= y < height and 0 <= x < width:
                near = mask[max(0, y - grow) : y + grow + 1, max(0, x - grow) : x + grow + 1]
                m[i, j] = min(1.0, a * near.max())
                p[:, i, j] = pattern[:, y, x]
    return m, p


def test_boosted_triggers_equal_a_literal_transcription() -> None:
    rng = np.random.default_rng(0)
    masks, patterns = rng.random((2, 6, 7), dtype=np.float32) ** 3, rng.random((2, 3, 6, 7), dtype=np.float32)
    for k in range(2):
        for seed in range(4):
            m, p = boosted(
                torch.tensor(masks[k : k + 1]), torch.tensor(patterns[k : k + 1]), 3, generator(seed), boost=(1.5, 1.5)
            )
            for i in range(3):
                fits = [
                    np.allclose(m[i, 0], want_m, atol=1e-6) and np.allclose(p[i], want_p)
                    for grow in (0, 1) for dy in range(-2, 3) for dx in range(-2, 3)
                    for want_m, want_p in [plain_boost(masks[k], patterns[k], 1.5, grow, dy, dx)]
                ]  # fmt: skip
                assert sum(fits) == 1


def test_boosts_are_drawn_over_their_whole_range() -> None:
    masks = torch.zeros(3, 9, 9)
    patterns = torch.arange(3).div(2).view(3, 1, 1, 1).expand(3, 3, 9, 9)
    masks[:, 4, 4] = 0.2
    m, p = boosted(masks, patterns, 3000, generator())
    strength = m.amax(dim=(1, 2, 3)) / 0.2
    assert 0.7 <= float(strength.min()) < 0.72
    assert 2.98 < float(strength.max()) <= 3.0001
    assert float(strength.mean()) == pytest.approx(1.85, abs=0.05)
    area = (m > 0).sum(dim=(1, 2, 3))
    assert set(area.tolist()) == {1, 9}
    single = m[area == 1][:, 0].nonzero()[:, 1:]
    assert len(single.unique(dim=0)) == 25
    which = p[:, 0, 4, 4].unique(return_counts=True)
    assert which[0].tolist() == [0, 0.5, 1]
    assert int(which[1].min()) > 900


def test_no_boost_is_the_trigger_itself() -> None:
    mask, pattern = torch.rand(1, 5, 5, generator=generator()), torch.rand(1, 3, 5, 5, generator=generator())
    m, p = boosted(mask, pattern, 2, generator(), boost=(1.0, 1.0), shift=0, dilation=0)
    assert torch.equal(m[1], mask)
    assert torch.equal(p[1], pattern[0])
