import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from cupel.augment import SimCLRAugment
from cupel.augment.colour import Jitter, affine_map, recolour
from cupel.augment.crop import crop_boxes, resample
from cupel.errors import SettingsError
from cupel.seeds import Seed

OFF = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
STILL = {**OFF, "crop": False, "flip": 0.0, "grayscale": 0.0}  # changes nothing
DRAWS = 10_000


def images(n: int, side: int = 32, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, (n, 3, side, side), dtype=torch.uint8, generator=Seed(side).torch())


def jitter(n: int, **changes: float) -> Jitter:
    values = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, **changes}
    gray = torch.full((n,), bool(values.pop("gray", False)))
    return Jitter(*(torch.full((n,), value) for value in values.values()), gray)


def test_with_everything_off_images_come_back() -> None:
    raw = images(5)
    out = SimCLRAugment(**STILL)(raw, Seed(0).torch())
    torch.testing.assert_close(out, raw / 255, atol=1e-6, rtol=0)
    whole = SimCLRAugment(**{**STILL, "crop": True}, min_scale=1.0, min_ratio=1.0, max_ratio=1.0)
    torch.testing.assert_close(whole(raw, Seed(0).torch()), raw / 255, atol=1e-4, rtol=0)


def test_rates_over_ten_thousand_draws() -> None:
    raw = images(1, side=4).expand(DRAWS, -1, -1, -1)
    generator = Seed(0).torch()
    flipped = SimCLRAugment(**{**STILL, "flip": 0.5})(raw, generator)
    mirrored = (flipped - raw.flip(-1) / 255).abs().amax(dim=(1, 2, 3)) < 1e-5
    unchanged = (flipped - raw / 255).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert (mirrored ^ unchanged).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.02)
    gray = SimCLRAugment(**{**STILL, "grayscale": 0.2})(raw, generator)
    is_gray = (gray.amax(dim=1) - gray.amin(dim=1)).amax(dim=(1, 2)) < 1e-5
    assert is_gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    jittered = SimCLRAugment(**{**STILL, "brightness": 0.4})(raw, generator)
    changed = (jittered - raw / 255).abs().amax(dim=(1, 2, 3)) > 1e-5
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.02)


def test_default_rates_of_the_drawn_parameters() -> None:
    drawn = SimCLRAugment()._jitter(DRAWS, Seed(1).torch())
    assert drawn.gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    applied = drawn.brightness != 1
    assert applied.float().mean().item() == pytest.approx(0.8, abs=0.02)
    for values, low, high in ((drawn.brightness, 0.6, 1.4), (drawn.contrast, 0.6, 1.4), (drawn.hue, -0.1, 0.1)):
        values = values[applied]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    strengths = torch.stack([drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue])[:, applied]
    assert (torch.corrcoef(strengths) - torch.eye(4)).abs().max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 60)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(DRAWS, height, width, scale, ratio, Seed(2).torch())
    left, top, w, h = boxes.unbind(dim=1)
    area = w * h / (height * width)
    assert area.min() >= 0.08 - 1e-6
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w <= width + 1e-4).all()
    assert (top + h <= height + 1e-4).all()
    assert (w / h).min() >= 3 / 4 - 1e-5
    assert (w / h).max() <= 4 / 3 + 1e-5
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)])
    their_top, their_left, their_h, their_w = theirs.float().unbind(dim=1)
    their_area = their_w * their_h / (height * width)
    assert area.mean().item() == pytest.approx(their_area.mean().item(), abs=0.012)
    assert area.std().item() == pytest.approx(their_area.std().item(), abs=0.012)
    for ours, other, side in (
        (w, their_w, width),
        (h, their_h, height),
        (left, their_left, width),
        (top, their_top, height),
    ):
        assert ours.mean().item() == pytest.approx(other.mean().item(), abs=0.02 * side)
        assert ours.std().item() == pytest.approx(other.std().item(), abs=0.02 * side)


def test_crop_of_a_ramp_is_the_ramp() -> None:
    """Bilinear sampling is exact on linear images, so every crop of a ramp has a closed form."""
    n, side, size = 200, 32, 24
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    ramp = torch.stack([x, y, 2 * x + 3 * y]).expand(n, 3, side, side).contiguous()
    boxes = crop_boxes(n, side, side, (0.08, 1.0), (3 / 4, 4 / 3), Seed(3).torch())
    flip = torch.arange(n) % 2 == 1
    out = resample(ramp, boxes, flip, (size, size))
    left, top, w, h = (one[:, None, None] for one in boxes.unbind(dim=1))
    u = ((torch.arange(size) + 0.5) / size).expand(n, size, size)
    columns = left + w * torch.where(flip[:, None, None], 1 - u, u)
    rows = top + h * ((torch.arange(size) + 0.5) / size)[:, None].expand(n, size, size)
    columns, rows = columns.clamp(0.5, side - 0.5), rows.clamp(0.5, side - 0.5)  # the image ends there
    torch.testing.assert_close(out, torch.stack([columns, rows, 2 * columns + 3 * rows], dim=1), atol=2e-4, rtol=0)


def test_crop_equals_torchvisions_resized_crop_inside_the_box() -> None:
    x = torch.rand(1, 3, 32, 32, generator=Seed(4).torch())
    ours = resample(x, torch.tensor([[5.0, 9.0, 16.0, 12.0]]), torch.tensor([False]), (32, 32))
    theirs = tv.resized_crop(x, 9, 5, 12, 16, [32, 32], antialias=False)
    edge = 2  # theirs repeats the border of the box where ours sees the image
    inner = slice(edge, -edge)
    torch.testing.assert_close(ours[..., inner, inner], theirs[..., inner, inner], atol=1e-5, rtol=0)
    mirrored = resample(x, torch.tensor([[5.0, 9.0, 16.0, 12.0]]), torch.tensor([True]), (32, 32))
    torch.testing.assert_close(mirrored, ours.flip(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.2, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_single_factors_equal_torchvisions(name: str, factor: float) -> None:
    raw = images(8, low=90, high=165)  # far enough from 0 and 255 that nothing is clamped
    ours = recolour(raw.float(), jitter(8, **{name: factor}), top=255.0)
    theirs = getattr(tv, f"adjust_{name}")(raw / 255, factor)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_brightness_alone_equals_torchvisions_when_it_clamps() -> None:
    raw = images(4)
    ours = recolour(raw.float(), jitter(4, brightness=1.4), top=255.0)
    torch.testing.assert_close(ours, tv.adjust_brightness(raw / 255, 1.4), atol=1e-5, rtol=0)


def test_grey_equals_torchvisions() -> None:
    raw = images(4)
    ours = recolour(raw.float(), jitter(4, gray=1.0), top=255.0)
    torch.testing.assert_close(ours, tv.rgb_to_grayscale(raw / 255, 3), atol=1e-4, rtol=0)


def test_the_chain_equals_torchvisions_steps_in_our_order() -> None:
    raw = images(6, low=110, high=146)
    ours = recolour(raw.float(), jitter(6, brightness=1.2, contrast=0.7, saturation=1.3, gray=1.0), top=255.0)
    theirs = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(raw / 255, 1.2), 0.7), 1.3)
    torch.testing.assert_close(ours, tv.rgb_to_grayscale(theirs, 3), atol=1 / 255, rtol=0)


def test_hue_turns_the_colour_circle_and_leaves_grey_and_luma_alone() -> None:
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(recolour(grey, jitter(1, hue=0.3)), grey, atol=1e-5, rtol=0)
    matrix, offset = affine_map(jitter(1, hue=0.17), torch.zeros(1))
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luma @ matrix[0], luma, atol=1e-5, rtol=0)
    assert offset.abs().max() < 1e-6
    third, _ = affine_map(jitter(1, hue=1 / 3), torch.zeros(1))
    torch.testing.assert_close(third[0] @ third[0] @ third[0], torch.eye(3), atol=1e-4, rtol=0)
    assert (third[0] @ torch.tensor([1.0, 0.0, 0.0])).argmax() == 1  # red → green, as in HSV
    # only loosely the same as HSV: the change points the same way (cosine 0.69–0.74 here), the other sense is far off
    x = images(16, low=80, high=176) / 255
    for hue in (-0.1, -0.05, 0.05, 0.1):
        ours, theirs = recolour(x, jitter(16, hue=hue)), tv.adjust_hue(x, hue)
        assert F.cosine_similarity((ours - x).flatten(), (theirs - x).flatten(), dim=0) > 0.65
        assert (ours - theirs).abs().mean() < 0.5 * (recolour(x, jitter(16, hue=-hue)) - theirs).abs().mean()
        assert (ours - theirs).abs().mean() < 0.04


def test_same_generator_same_views_and_rows_are_independent() -> None:
    raw = images(64)
    before = raw.clone()
    augment = SimCLRAugment()
    a, b, c = (augment(raw, Seed(s).torch()) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(raw, before)
    same = augment(raw[:1].expand(64, -1, -1, -1), Seed(0).torch())
    assert len({tuple(view.flatten()[:50].tolist()) for view in same}) == 64


def test_state_of_the_global_generator_does_not_matter() -> None:
    raw, before = images(4), torch.random.get_rng_state()
    SimCLRAugment()(raw, Seed(0).torch())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("size", [None, 24, 48])
@pytest.mark.parametrize("crop", [True, False])
def test_range_shape_type_and_memory_format(size: int | None, crop: bool) -> None:
    augment = SimCLRAugment(crop=crop, render_size=size, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)
    out = augment(images(40), Seed(0).torch())
    assert out.shape == (40, 3, size or 32, size or 32)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.min() >= 0
    assert out.max() <= 1
    assert out.max() > 0.9


def test_without_crop_a_smaller_rendering_shows_the_whole_image() -> None:
    raw = images(3)
    out = SimCLRAugment(**STILL, render_size=16)(raw, Seed(0).torch())
    torch.testing.assert_close(out, F.avg_pool2d(raw / 255, 2), atol=1e-5, rtol=0)


def test_mixed_precision_does_not_reach_the_pixels() -> None:
    raw = images(8)
    plain = SimCLRAugment()(raw, Seed(0).torch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = SimCLRAugment()(raw, Seed(0).torch())
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_memory_format_of_the_input_does_not_matter() -> None:
    raw = images(8)
    other = raw.contiguous(memory_format=torch.channels_last)
    assert torch.equal(SimCLRAugment()(raw, Seed(0).torch()), SimCLRAugment()(other, Seed(0).torch()))
    assert SimCLRAugment()(raw[:0], Seed(0).torch()).shape == (0, 3, 32, 32)


def test_presets() -> None:
    assert SimCLRAugment.preset("badencoder") == SimCLRAugment.preset("google") == SimCLRAugment()
    assert SimCLRAugment.preset("references") == SimCLRAugment(crop=False)
    assert SimCLRAugment.preset("digits").flip == 0
    strong = SimCLRAugment.preset("strong")
    assert (strong.min_scale, strong.hue, strong.jitter_probability, strong.grayscale) == (0.3, 0.5, 1.0, 0.3)


def test_wrong_settings() -> None:
    for wrong in ({"min_scale": 0.0}, {"hue": 0.6}, {"flip": 1.1}, {"render_size": 0}, {"brightness": -0.1}):
        with pytest.raises(SettingsError):
            SimCLRAugment(**wrong)
    with pytest.raises(SettingsError, match=r"min_scale: 0.9 is above max_scale = 0.5"):
        SimCLRAugment(min_scale=0.9, max_scale=0.5)
    assert math.isclose(SimCLRAugment().max_ratio, 4 / 3)


@pytest.mark.gpu
def test_cpu_generator_gives_the_same_views_on_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    raw = images(64)
    cpu = SimCLRAugment()(raw, Seed(0).torch())
    cuda = SimCLRAugment()(raw.cuda(), Seed(0).torch())
    torch.testing.assert_close(cuda.cpu(), cpu, atol=1e-4, rtol=0)
    own = SimCLRAugment()(raw.cuda(), Seed(0).torch("cuda"))
    assert own.is_cuda
