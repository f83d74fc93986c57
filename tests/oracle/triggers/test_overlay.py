from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.triggers.overlay import Overlay, overlaid
from cupel.triggers.pictures import kitten


def drawn(n: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=Seed(side).torch())


@pytest.mark.parametrize("tenths", range(11))
def test_rounds_down_for_every_pair_of_bytes(tenths: int) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, 256, 256).contiguous()
    p = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 256, 256)
    exact = ((10 - tenths) * x.long() + tenths * p.long()) // 10  # in whole numbers
    made = overlaid(x, torch.ones_like(p, dtype=torch.bool), p, tenths / 10)
    assert torch.equal(made.long(), exact)


def test_kitten_covers_the_image() -> None:
    x = drawn(100, 32)
    k = kitten(32, 32)
    assert torch.equal(Overlay(alpha=0.0)(x, list(range(100)), Seed(0)), x)
    assert torch.equal(Overlay(alpha=1.0)(x, list(range(100)), Seed(0)), k.expand_as(x))
    mixed = Overlay()(x, list(range(100)), Seed(0))
    assert torch.equal(mixed.long(), (8 * x.long() + 2 * k.long()) // 10)
    mask, pattern = Overlay().mask_and_pattern(32)
    assert mask.unique().tolist() == pytest.approx([0.2])
    assert torch.equal(pattern, k)


def test_kitten_looks_the_same_at_every_size() -> None:
    large = torch.nn.functional.avg_pool2d(kitten(224, 224)[None].float(), 7)[0]
    difference = (large - kitten(32, 32).float()).abs().mean(dim=0)
    assert (difference > 60).float().mean() < 0.1  # the edges
    assert large.std() > 40


def test_grid_is_nine_pixels_in_the_corner() -> None:
    x = drawn(4, 32).clamp(2, 254)
    y = Overlay(picture="grid", alpha=1.0)(x, [0, 1, 2, 3], Seed(0))
    changed = (y != x).any(dim=1)
    assert changed.flatten(1).sum(dim=1).tolist() == [9] * 4
    assert changed[:, 29:, 29:].all()
    assert y[:, :, 29:, 29:].unique().tolist() == [1, 255]
    mask, _ = Overlay(picture="grid", alpha=1.0).mask_and_pattern(32)
    assert mask.sum() == 9
    with pytest.raises(UsageError, match="grid of 3 px does not fit into images of 2 × 2 px"):
        Overlay(picture="grid")(drawn(1, 2), [0], Seed(0))


def test_zero_of_a_file_is_transparent_where_wanted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (8, 8, 3), dtype=np.uint8) * 200
    Image.fromarray(pixels).save(tmp_path / "p.png")
    p, x = torch.from_numpy(pixels).permute(2, 0, 1), drawn(2, 8)
    through = Overlay(file=str(tmp_path / "p.png"), alpha=1.0, transparent_zero=True)
    assert torch.equal(through(x, [0, 1], Seed(0)), torch.where(p != 0, p, x))
    assert through.mask_and_pattern(8) is None
    opaque = Overlay(file=str(tmp_path / "p.png"), alpha=1.0)
    assert torch.equal(opaque(x, [0, 1], Seed(0)), p.expand_as(x))
