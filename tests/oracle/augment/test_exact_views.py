"""The published chain, and how the batched views differ from it: the factors not at all, the pixels by what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as F

from cupel.augment import SimCLRAugment
from cupel.augment.colour import Jitter, recolour
from cupel.augment.crop import crop_boxes
from cupel.seeds import Seed
from photos import photographs

OFF = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
STILL = {**OFF, "crop": False, "flip": 0.0, "grayscale": 0.0, "jitter_probability": 1.0}
DRAWS = 6000


def images(n: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, (n, 3, 32, 32), dtype=torch.uint8, generator=Seed(n).torch())


def literal(raw: Tensor, generator: torch.Generator) -> Tensor:
    """The chain of the defaults written out, with the draws in the order in which the transforms make them."""
    views = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for image in raw:
            x = F.to_pil_image(image)
            top, left, h, w = T.RandomResizedCrop.get_params(x, [0.08, 1.0], [3 / 4, 4 / 3])
            x = F.resized_crop(x, top, left, h, w, [32, 32], F.InterpolationMode.BILINEAR)
            if torch.rand(1) < 0.5:
                x = F.hflip(x)
            if torch.rand(1) <= 0.8:
                order, b, c, s, hue = T.ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])
                changes = {0: (F.adjust_brightness, b), 1: (F.adjust_contrast, c)}
                changes |= {2: (F.adjust_saturation, s), 3: (F.adjust_hue, hue)}
                for k in order.tolist():
                    change, factor = changes[k]
                    x = change(x, factor)
            if torch.rand(1) < 0.2:
                x = F.rgb_to_grayscale(x, 3)
            views.append(F.to_tensor(x))
    return torch.stack(views)


def test_exact_views_are_the_published_chain() -> None:
    raw = images(30)
    before, state = raw.clone(), torch.random.get_rng_state()
    ours = SimCLRAugment().exact(raw, Seed(3).torch())
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing leaks
    assert torch.equal(raw, before)
    assert torch.equal(ours, literal(raw, Seed(3).torch()))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(5)
    assert torch.equal(SimCLRAugment().exact(raw, Seed(3).torch()), ours)  # and nothing leaks in
    assert not torch.equal(SimCLRAugment().exact(raw, Seed(4).torch()), ours)


def test_exact_views_know_every_setting() -> None:
    raw = images(6)
    still = SimCLRAugment(**STILL)
    assert torch.equal(still.exact(raw, Seed(0).torch()), raw / 255)
    assert SimCLRAugment(render_size=24).exact(raw, Seed(0).torch()).shape == (6, 3, 24, 24)
    assert SimCLRAugment(**STILL, render_size=24).exact(raw, Seed(0).torch()).shape == (6, 3, 24, 24)
    assert SimCLRAugment().exact(raw[:0], Seed(0).torch()).shape == (0, 3, 32, 32)
    flipped = SimCLRAugment(**{**STILL, "flip": 1.0}).exact(raw, Seed(0).torch())
    assert torch.equal(flipped, raw.flip(-1) / 255)


@pytest.mark.parametrize("name", ["flip", "grayscale"])
def test_flip_and_grey_alone_are_the_same_pixel_by_pixel(name: str) -> None:
    raw, augment = images(8), SimCLRAugment(**{**STILL, name: 1.0})
    fused, exact = augment(raw, Seed(0).torch()), augment.exact(raw, Seed(1).torch())
    assert (fused - exact).abs().max() <= 0.51 / 255


def ks(a: Tensor, b: Tensor) -> float:
    """Largest distance between two empirical distribution functions."""
    points = torch.cat([a, b]).sort().values
    shares = [torch.searchsorted(one.sort().values, points, right=True) / len(one) for one in (a, b)]
    return (shares[0] - shares[1]).abs().max().item()


def assert_same_distribution(a: Tensor, b: Tensor) -> None:
    """Mean, variance, quantiles; each bound is met by chance 9 999 times in 10 000."""
    n, m = len(a), len(b)
    assert ks(a, b) < 2.23 * (1 / n + 1 / m) ** 0.5
    spread = (a.var() / n + b.var() / m).sqrt()
    assert (a.mean() - b.mean()).abs() < 3.9 * spread
    fourth = [((x - x.mean()) ** 4).mean() - x.var() ** 2 for x in (a, b)]
    assert (a.var() - b.var()).abs() < 3.9 * (fourth[0] / n + fourth[1] / m).sqrt()


def test_crops_have_torchvisions_distribution() -> None:
    ours = crop_boxes(DRAWS, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3), Seed(0).torch())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        drawn = [T.RandomResizedCrop.get_params(torch.zeros(3, 32, 32), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in ours]
    top, left, h, w = torch.tensor(drawn).float().T
    left_, top_, w_, h_ = ours.T
    for a, b in ((left_, left), (top_, top), (w_, w), (h_, h), (w_ * h_, w * h), (w_ / h_, w / h)):
        assert_same_distribution(a, b)


def test_factors_have_torchvisions_distribution() -> None:
    drawn = SimCLRAugment()._jitter(2 * DRAWS, Seed(0).torch())
    applied = drawn.brightness != 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        ranges = [[0.6, 1.4]] * 3 + [[-0.1, 0.1]]
        theirs = [T.ColorJitter.get_params(*ranges) for _ in range(DRAWS)]
    factors = torch.tensor([one[1:] for one in theirs]).T
    for ours, other in zip(drawn[:4], factors, strict=True):
        assert_same_distribution(ours[applied], other)
    for rate, expected in ((applied, 0.8), (drawn.gray, 0.2)):
        assert abs(rate.float().mean().item() - expected) < 3.9 * (0.16 / len(rate)) ** 0.5
    # the place of each change in the chain
    places = drawn.when.argsort(dim=0).argsort(dim=0).float()
    their_places = torch.stack([one[0] for one in theirs]).argsort(dim=1).float().T
    for ours, other in zip(places, their_places, strict=True):
        assert_same_distribution(ours, other)
    hue_after_contrast = (places[3] > places[1]).float().mean() - (their_places[3] > their_places[1]).float().mean()
    assert hue_after_contrast.abs() < 3.9 * (0.25 / DRAWS + 0.25 / (2 * DRAWS)) ** 0.5


def statistics(x: Tensor) -> dict[str, Tensor]:
    """Per image: mean, standard deviation, saturation and the mean colour's angle on the colour circle."""
    mean = x.mean(dim=(2, 3))
    green_blue = 3**0.5 * (mean[:, 1] - mean[:, 2])
    return {
        "mean": mean.mean(dim=1),
        "std": x.flatten(1).std(dim=1),
        "saturation": (1 - x.amin(dim=1) / x.amax(dim=1).clamp_min(1e-3)).mean(dim=(1, 2)),
        "hue": torch.atan2(green_blue, 2 * mean[:, 0] - mean[:, 1] - mean[:, 2]),
    }


def pixel_distances(raw: Tensor, augment: SimCLRAugment, repeats: int) -> dict[str, tuple[float, float]]:
    """KS distance and shift of the mean in standard deviations, fused against exact, by statistic."""
    many = raw.repeat(repeats, 1, 1, 1)
    fused, exact = statistics(augment(many, Seed(0).torch())), statistics(augment.exact(many, Seed(1).torch()))
    return {
        name: (ks(a, exact[name]), ((a.mean() - exact[name].mean()) / exact[name].std()).item())
        for name, a in fused.items()
    }


@pytest.mark.full
@pytest.mark.parametrize("preset", ["badencoder", "strong"])
def test_views_of_photographs_are_distributed_as_the_published_ones(data_root: Path, preset: str) -> None:
    """Measured on 1 500 photographs, four views each: distances 0.013–0.035, shifts of at most 0.032."""
    distances = pixel_distances(photographs(data_root, 1500), SimCLRAugment.preset(preset), repeats=4)
    noise = 2.23 * (2 / 6000) ** 0.5  # of two samples of one distribution
    print(
        preset, {name: tuple(round(v, 4) for v in both) for name, both in distances.items()}, "noise", round(noise, 4)
    )
    for name, (distance, shift) in distances.items():
        assert distance < noise, name
        assert abs(shift) < 3.9 * (2 / 6000) ** 0.5, name


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_one_change_alone_is_the_same_pixel_by_pixel(name: str) -> None:
    """The factor is the one that the exact chain draws."""
    raw = images(1, low=60, high=190)
    augment = SimCLRAugment(**{**STILL, name: 0.4})
    exact = augment.exact(raw, Seed(2).torch())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=Seed(2).torch())))
        torch.rand(2)  # flip, RandomApply
        torch.randperm(4)
        factor = torch.empty(1).uniform_(0.6, 1.4)
    neutral = Jitter(*torch.ones(3, 1), torch.zeros(1), torch.tensor([False]), torch.zeros(4, 1))
    fused = recolour(raw.float(), neutral._replace(**{name: factor}), top=255.0)
    assert (fused - exact).abs().max() < 1.6 / 255  # Pillow cuts fractions off, and rounds the mean grey
    assert (fused - raw / 255).abs().mean() > 4 / 255
