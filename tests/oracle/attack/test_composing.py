"""Layouts against random crops, and pastes against the pixels they must show."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from cupel.attack.composing import (
    Box,
    Layout,
    Side,
    Size,
    backdrop,
    canvas_of,
    cut_out,
    fitted,
    lay_out,
    pasted,
    resized,
    room_of,
    tight_box,
)
from cupel.augment.crop import crop_boxes
from cupel.errors import UsageError

SIDES: tuple[Side, ...] = get_args(Side)


def overlap(boxes: torch.Tensor, box: Box) -> torch.Tensor:
    """Shared pixels of crops (left, top, width, height) and a box."""
    left, top, width, height = boxes.unbind(dim=1)
    across = (left + width).clamp(max=box.left + box.width) - left.clamp(min=box.left)
    down = (top + height).clamp(max=box.top + box.height) - top.clamp(min=box.top)
    return across.clamp(min=0) * down.clamp(min=0)


def good(canvas: Size, thing: Box, trigger: Box, pairs: int = 20_000, part: float = 0.5, rest: float = 0.1) -> float:
    """Share of pairs of crops of which one shows the object without the trigger, the other the trigger alone."""
    first, second = (
        crop_boxes(pairs, *canvas, (0.2, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    area = thing.height * thing.width

    def one_way(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shows = (overlap(a, thing) >= part * area) & (overlap(a, trigger) == 0)
        marks = (overlap(b, trigger) == trigger.height * trigger.width) & (overlap(b, thing) < rest * area)
        return shows & marks

    return float((one_way(first, second) | one_way(second, first)).float().mean())


def inside_and_alone(canvas: Size, thing: Box, trigger: Box) -> float:
    """The paper's event, counted over all places of square crops and summed over their sizes: one crop lies in the
    object, the other holds the trigger and nothing of the object."""
    total = 0.0
    for s in range(1, min(canvas) + 1):
        within = holds = n = 0
        for y, x in itertools.product(range(canvas.height - s + 1), range(canvas.width - s + 1)):
            n += 1
            within += thing.top <= y <= thing.top + thing.height - s and thing.left <= x <= thing.left + thing.width - s
            apart = (
                x >= thing.left + thing.width or x + s <= thing.left or y >= thing.top + thing.height
                or y + s <= thing.top
            )  # fmt: skip
            holds += (
                y <= trigger.top and trigger.top + trigger.height <= y + s
                and x <= trigger.left and trigger.left + trigger.width <= x + s and apart
            )  # fmt: skip
        total += within * holds / n**2
    return total


THING, TRIGGER = Size(300, 300), Size(40, 40)
CANVAS = canvas_of(THING, "left")


def test_the_published_canvas_makes_good_pairs_and_a_pasted_trigger_makes_none():
    assert Size(300, 600) == CANVAS
    shares = []
    for u in itertools.product((0.0, 0.5, 0.99), (0.1, 0.5, 0.9), (0.1, 0.5, 0.9)):
        shares.append(good(CANVAS, *lay_out(CANVAS, THING, TRIGGER, "left", offset=0.05, margin=0.25, at=u), 6000))
    assert np.mean(shares) == pytest.approx(0.10, abs=0.02)
    best = good(CANVAS, *lay_out(CANVAS, THING, TRIGGER, "left"))
    assert best >= np.mean(shares)
    on_the_object = [good(THING, Box(0, 0, 300, 300), Box(y, x, 40, 40), 6000) for y in (75, 130) for x in (75, 185)]
    assert max(on_the_object) == 0.0


def test_an_object_in_the_middle_spoils_it():
    trigger = lay_out(CANVAS, THING, TRIGGER, "left").trigger
    assert good(CANVAS, Box(0, 150, 300, 300), trigger) <= 0.005


@pytest.mark.parametrize(("thing", "share"), [((160, 160), 0.002), ((320, 160), 0.001), ((107, 107), 0.003)])
def test_square_canvases_leave_few_good_pairs(thing, share):
    """What `CorruptEncoder` says of square images; the trigger has the published share of their side."""
    square = Size(320, 320)
    draws = itertools.product((0.0, 0.5, 0.99), (0.1, 0.5, 0.9), (0.1, 0.5, 0.9))
    layouts = [lay_out(square, Size(*thing), Size(57, 57), "left", offset=0.05, margin=0.25, at=u) for u in draws]
    assert np.mean([good(square, *one, 10_000) for one in layouts]) == pytest.approx(share, abs=0.0006)


def test_random_crops_find_no_better_place_than_the_chosen_one():
    chosen = lay_out(CANVAS, THING, TRIGGER, "left")
    best = good(CANVAS, *chosen)
    for x, y in itertools.product((300, 365, 430, 495, 560), (0, 65, 130, 195, 260)):
        noise = 4 * (best / 20_000) ** 0.5
        assert good(CANVAS, chosen.thing, Box(y, x, 40, 40)) <= best + noise, (x, y)


def test_the_chosen_layout_is_the_best_of_all_square_crops():
    """Theorem 1 (places) and theorem 2 (height of the canvas = the object's), on a small canvas."""
    thing, trigger = Size(10, 10), Size(2, 2)
    canvas = canvas_of(thing, "left")
    chosen = lay_out(canvas, thing, trigger, "left")
    assert chosen == Layout(Box(0, 0, 10, 10), Box(4, 14, 2, 2))
    best = inside_and_alone(canvas, *chosen)
    others = {
        (left, y, x): inside_and_alone(canvas, Box(0, left, 10, 10), Box(y, x, 2, 2))
        for left, y, x in itertools.product((0, 3, 5), (0, 2, 4, 6, 8), (10, 12, 14, 16, 18))
        if x >= left + 10 and (left, y, x) != (0, 4, 14)
    }
    assert max(others.values()) < best
    by_height = [inside_and_alone(Size(h, 20), *lay_out(Size(h, 20), thing, trigger, "left")) for h in (10, 12, 14)]
    assert by_height == sorted(by_height, reverse=True)
    by_ratio = {
        ratio: inside_and_alone(wide, *lay_out(wide, thing, trigger, "left"))
        for ratio in (1.4, 1.6, 2.0, 2.6, 3.0)
        for wide in [canvas_of(thing, "left", ratio)]
    }
    assert max(by_ratio, key=by_ratio.__getitem__) == 2.0


def test_object_and_trigger_are_inside_and_never_overlap():
    draw = np.random.default_rng(0)
    for _ in range(10_000):
        side = SIDES[draw.integers(4)]
        thing = Size(*draw.integers(8, 60, 2).tolist())
        canvas = canvas_of(thing, side)
        assert canvas == (
            (thing.height, 2 * thing.width) if side in ("left", "right") else (2 * thing.height, thing.width)
        )
        trigger = Size(*draw.integers(1, 9, 2).tolist())
        offset, margin = draw.uniform(0, 0.2), draw.uniform(0, 0.5)
        boxes = lay_out(canvas, thing, trigger, side, offset=offset, margin=margin, at=tuple(draw.uniform(size=3)))
        painted = np.zeros(canvas, dtype=int)
        for box, size in zip(boxes, (thing, trigger), strict=True):
            assert min(box.top, box.left) >= 0
            assert (box.height, box.width) == size
            painted[box.rows, box.columns] += 1
        assert painted.max() == 1
        assert painted.sum() == thing.height * thing.width + trigger.height * trigger.width


@pytest.mark.parametrize("side", SIDES)
def test_published_margins(side):
    """Object at most 0.05 of the canvas from its side; trigger 0.125 of it from the borders of the other half."""
    canvas = Size(100, 200) if side in ("left", "right") else Size(200, 100)
    starts = []
    for u in itertools.product((0.0, 0.3, 0.999), repeat=3):
        thing, trigger = lay_out(canvas, Size(100, 100), Size(20, 20), side, offset=0.05, margin=0.25, at=u)
        at, across, start = (
            (thing.left, trigger.top, trigger.left)
            if side in ("left", "right")
            else (thing.top, trigger.left, trigger.top)
        )
        if side in ("right", "bottom"):
            at, start = 200 - at - 100, 200 - start - 20
        starts.append((at, start, across))
        assert 0 <= at <= 10
        assert 125 <= start <= 155
        assert 25 <= across <= 55
    assert max(starts) == (10, 155, 55)
    assert min(starts) == (0, 125, 25)


def test_bottom_aligned_and_in_the_middle_where_margins_are_too_wide():
    thing, trigger = lay_out(Size(32, 32), Size(10, 16), Size(12, 12), "left", margin=0.25, at=(0.0, 0.5, 0.5))
    assert thing == Box(22, 0, 10, 16)
    assert trigger == Box(10, 18, 12, 12)
    full = lay_out(Size(16, 32), Size(16, 16), Size(16, 16), "right", offset=0.05, margin=0.25, at=(0.9, 0.9, 0.9))
    assert full == Layout(Box(0, 16, 16, 16), Box(0, 0, 16, 16))


def test_what_does_not_fit_is_one_line():
    with pytest.raises(UsageError, match="an object of 33 × 16 px does not fit into a canvas of 32 × 32 px"):
        lay_out(Size(32, 32), Size(33, 16), Size(4, 4), "left")
    for side, left in (("left", "32 × 16"), ("bottom", "16 × 32")):
        thing = Size(32, 16) if side == "left" else Size(16, 32)
        with pytest.raises(
            UsageError, match=f"a trigger of 17 × 17 px does not fit beside the object, where {left} px"
        ):
            lay_out(Size(32, 32), thing, Size(17, 17), side)


def test_room_is_what_the_canvas_was_made_for():
    for side, ratio in itertools.product(SIDES, (1.5, 2.0, 3.0)):
        assert room_of(canvas_of(Size(24, 30), side, ratio), side, ratio) == (24, 30)
    assert fitted(Size(40, 20), Size(32, 16)) == (32, 16)
    assert fitted(Size(10, 10), Size(32, 16)) == (16, 16)
    assert fitted(Size(1, 1000), Size(32, 16)) == (1, 16)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_cut_and_pasted_pixels_are_the_objects_and_the_rest_is_untouched():
    source, mask = picture(20, 24), torch.zeros(20, 24, dtype=torch.bool)
    mask[3:11, 5:17] = True
    mask[3:5, 5:7] = False
    assert tight_box(mask) == Box(3, 5, 8, 12)
    pixels, cover = cut_out(source, mask, Size(8, 12))
    assert torch.equal(pixels, source[:, 3:11, 5:17])
    assert torch.equal(cover, mask[3:11, 5:17].float())
    ground = picture(32, 32, 1)
    before, box = ground.clone(), Box(24, 2, 8, 12)
    made = pasted(ground, pixels, cover, box)
    assert torch.equal(ground, before)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[24:32, 2:14] = mask[3:11, 5:17]
    assert torch.equal(made[:, ~inside], ground[:, ~inside])
    assert torch.equal(made[:, inside], source[:, mask])
    half = pasted(ground, pixels, torch.full((8, 12), 0.5), box)[:, box.rows, box.columns].int()
    assert int((2 * half - pixels.int() - ground[:, box.rows, box.columns].int()).abs().max()) <= 1


def test_a_resized_outline_is_soft_at_its_edge_alone():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask[(y - 32) ** 2 + (x - 32) ** 2 < 28**2] = True
    _, cover = cut_out(picture(64, 64), mask, Size(16, 16))
    assert float(cover.min()) == 0.0
    assert float(cover[4:12, 4:12].min()) == 1.0
    soft = float(((cover > 0) & (cover < 1)).float().mean())
    assert 0 < soft < 0.35
    assert float(cover.mean()) == pytest.approx(np.pi / 4, abs=0.03)


def test_backdrops_are_enlarged_only_if_too_small_and_keep_their_bottom():
    wide = picture(40, 50)
    for u, left in ((0.0, 0), (0.5, 9), (0.999, 18)):
        assert torch.equal(backdrop(wide, Size(32, 32), u), wide[:, 8:, left : left + 32])
    same = picture(32, 32)
    assert torch.equal(backdrop(same, Size(32, 32), 0.7), same)
    small = backdrop(torch.full((3, 10, 30), 77, dtype=torch.uint8), Size(32, 32), 0.5)
    assert tuple(small.shape) == (3, 32, 32)
    assert small.unique().tolist() == [77]


def test_resizing_is_pillows():
    from PIL import Image

    source = picture(40, 28)
    theirs = Image.fromarray(source.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    ours = resized(source, Size(16, 16)).permute(1, 2, 0).numpy()
    assert int(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max()) <= 1
