"""Distortions: against Pillow, against triggers that were made at the other place, and what they leave alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cupel.distort import DISTORTIONS, Jpeg, Resize, Shift
from cupel.errors import SettingsError, UsageError
from cupel.seeds import Seed
from cupel.triggers import Patch

N, SIDE = 3, 32


def photos() -> torch.Tensor:
    """Smooth pictures with an edge in them."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    ramps = [np.stack([x, y, (x + k * y) / (1 + k)]) * 200 + 20 for k in range(N)]
    made = torch.from_numpy(np.stack(ramps)).round().to(torch.uint8)
    made[:, :, 10:20, 8:14] = 240
    return made


def by_pillow(raw: torch.Tensor, work) -> torch.Tensor:
    done = [np.asarray(work(Image.fromarray(one.permute(1, 2, 0).numpy()))) for one in raw]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("quality", [25, 50, 90])
def test_jpeg_is_what_a_file_would_hold(quality):
    def through_file(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling=2)
        return Image.open(io.BytesIO(file.getvalue()))

    raw = photos()
    kept = raw.clone()
    assert torch.equal(Jpeg(quality=quality)(raw), by_pillow(raw, through_file))
    assert torch.equal(raw, kept)


def test_jpeg_loses_more_at_lower_quality():
    raw = photos().float()
    errors = [(Jpeg(quality=q)(photos()).float() - raw).abs().mean() for q in (95, 50, 5)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("size", [8, 16, 24])
def test_resize_is_antialiased_like_pillow(size):
    def down_and_up(image):
        small = image.resize((size, size), Image.Resampling.BILINEAR)
        return small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)

    off = (Resize(size=size)(photos()).int() - by_pillow(photos(), down_and_up).int()).abs()
    assert int(off.max()) <= 2  # Pillow rounds after each direction as well; without antialiasing 30 and more


def test_resize_leaves_one_colour_alone_and_refuses_to_enlarge():
    flat = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(Resize(size=7)(flat), flat)
    with pytest.raises(UsageError, match="not larger than 16 px"):
        Resize(size=16)(flat)


@pytest.mark.parametrize("corner", ["bottom_right", "bottom_left", "top_right", "top_left"])
@pytest.mark.parametrize("pixels", [1, 4])
def test_shifted_patch_is_a_patch_with_a_larger_margin(corner, pixels):
    raw, ids = photos(), list(range(N))
    moved = Shift(pixels=pixels).trigger(Patch(size=6, corner=corner))
    wanted = Patch(size=6, corner=corner, margin=1 + pixels)(raw, ids, Seed(0))
    assert torch.equal(moved(raw, ids, Seed(0)), wanted)


def test_shift_moves_the_trigger_and_not_the_image():
    raw, ids = photos(), list(range(N))

    def adds_its_column(x, ids, seed):  # a trigger that covers everything and has no place
        return (x // 2) + torch.arange(SIDE, dtype=torch.uint8)

    moved = Shift(pixels=3).trigger(adds_its_column)(raw, ids, Seed(0))
    assert torch.equal(moved, (raw // 2) + torch.arange(SIDE, dtype=torch.uint8).roll(-3))


def test_a_distortion_comes_after_the_stamp():
    raw, ids = photos(), list(range(N))
    stamped = Patch(size=6)(raw, ids, Seed(0))
    assert torch.equal(Jpeg(quality=50).trigger(Patch(size=6))(raw, ids, Seed(0)), Jpeg(quality=50)(stamped))
    assert torch.equal(Resize(size=9).trigger(None)(raw, ids, Seed(0)), Resize(size=9)(raw))
    assert Shift(pixels=1).trigger(None) is None


def test_titles_tell_distortions_apart():
    assert [Jpeg(quality=50).title, Resize(size=24).title, Shift(pixels=3).title] == ["jpeg_50", "resize_24", "shift_3"]
    assert set(DISTORTIONS) == {"jpeg", "resize", "shift"}


@pytest.mark.parametrize(("cls", "wrong"), [(Jpeg, {"quality": 0}), (Jpeg, {"quality": 96}), (Shift, {"pixels": 0})])
def test_ranges(cls, wrong):
    with pytest.raises(SettingsError):
        cls(**wrong)
