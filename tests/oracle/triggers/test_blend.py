from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cupel.errors import DataError
from cupel.seeds import Seed
from cupel.triggers import Blend
from cupel.triggers.blend import blended


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.25, 0.5, 0.77, 1.0])
def test_formula_for_every_pair_of_bytes(alpha: float) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, 256, 256).contiguous()
    p = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 256, 256)
    expected = np.rint((1 - alpha) * x.numpy().astype(np.float64) + alpha * p.numpy())
    assert np.array_equal(blended(x, p, alpha).numpy(), expected)


def test_blend_mixes_its_own_pattern() -> None:
    x = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=Seed(1).torch())
    before = x.clone()
    trigger = Blend(alpha=0.3, pattern_seed=4)
    y = trigger(x, [0, 1], Seed(0))
    mask, pattern = trigger.mask_and_pattern(20)
    assert torch.equal(x, before)
    assert mask.unique().tolist() == pytest.approx([0.3])
    assert np.array_equal(y.numpy(), np.rint((1 - 0.3) * x.numpy().astype(np.float64) + 0.3 * pattern.numpy()))
    assert torch.equal(y, trigger(x, [8, 9], Seed(7)))


def test_patterns_are_smooth_fill_the_range_and_differ_by_seed() -> None:
    pattern = Blend().mask_and_pattern(64)[1].float()
    other = Blend(pattern_seed=1).mask_and_pattern(64)[1].float()
    assert pattern.amin(dim=(1, 2)).tolist() == [0, 0, 0]
    assert pattern.amax(dim=(1, 2)).tolist() == [255, 255, 255]
    assert pattern.diff(dim=2).abs().mean() < 20  # uniform noise has 85
    assert (pattern - other).abs().mean() > 20
    small = Blend().mask_and_pattern(32)[1].float()
    halved = torch.nn.functional.avg_pool2d(pattern[None], 2)[0]
    assert (halved - small).abs().mean() < 5  # the same picture at another size


def test_pattern_from_an_image_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    trigger = Blend(alpha=1.0, file=str(tmp_path / "p.png"))
    x = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    assert np.array_equal(trigger(x, [0], Seed(0))[0].permute(1, 2, 0).numpy(), pixels)
    assert trigger(torch.zeros(1, 3, 6, 8, dtype=torch.uint8), [0], Seed(0)).shape == (1, 3, 6, 8)


def test_unreadable_pictures_are_one_line(tmp_path: Path) -> None:
    x = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    for name, content in {"text.png": b"hello", "empty.png": b"", "cut.png": b"\x89PNG\r\n\x1a\n0000"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is no readable image"):
            Blend(file=str(tmp_path / name))(x, [0], Seed(0))
    with pytest.raises(DataError, match="no such file"):
        Blend(file=str(tmp_path / "absent.png"))(x, [0], Seed(0))
