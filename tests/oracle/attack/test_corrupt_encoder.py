"""What composed images show, where they go in the data, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cupel.attack.corrupt_encoder import CorruptEncoder
from cupel.data.shapes import SHAPES, render, shape_backgrounds, shape_objects
from cupel.errors import DataError, LabelsWithheld, SettingsError, UsageError
from cupel.seeds import Seed
from cupel.triggers import Blend, Patch, RandomPatch, Spectral
from cupel.types import Dataset, Goal, Knowledge, Objects

TARGET = 2
RED, GREEN, WHITE = (200, 0, 0), (0, 180, 0), 255


def flat(n: int, colour: tuple[int, int, int], height: int, width: int) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(n, 3, height, width).clone()


def dataset(n: int = 200, side: int = 32) -> Dataset:
    """Grey images whose level is their row."""
    levels = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 3, side, side).clone()
    return Dataset(levels, torch.arange(n) % 4, torch.arange(n) * 3 + 50, name="toy")


def red_objects(n: int = 8) -> Objects:
    """Red squares on black; the mask is the square."""
    masks = torch.zeros(n, 40, 40, dtype=torch.bool)
    masks[:, 10:30, 6:26] = True
    pictures = flat(n, RED, 40, 40) * masks[:, None]
    return Objects(pictures, masks, torch.full((n,), TARGET))


def attacker(objects: Objects | None = None, **goal: object) -> Knowledge:
    return Knowledge((Goal(target_class=TARGET, task="toy", **goal),), objects=objects)


CLEAN = dataset()
SMALL = CorruptEncoder(poison_rate=0.1, trigger=Patch(size=6))


def parts(image: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a composed image is red, where white, and where grey."""
    pixels = image.permute(1, 2, 0).numpy()
    red, white = (pixels == RED).all(-1), (pixels == WHITE).all(-1)
    return red, white, (pixels == pixels[..., :1]).all(-1) & ~white


def test_every_image_shows_object_trigger_and_nothing_else_new():
    made = SMALL.poison(CLEAN.without_labels("corrupt_encoder"), attacker(red_objects()), Seed(0))
    assert len(made.rows) == 22  # 10 % of 222
    sides = []
    for image in made.data.inputs[made.rows]:
        red, white, grey = parts(image)
        assert (red | white | grey).all()
        assert len(image[:, grey].unique()) == 1
        rows, columns = np.nonzero(red)
        assert red.sum() == 16 * 16, "half as wide as the image, and square as it was"
        assert (np.ptp(rows), np.ptp(columns), rows.max()) == (15, 15, 31)
        at = np.nonzero(white)
        assert white.sum() == 36
        assert (np.ptp(at[0]), np.ptp(at[1])) == (5, 5)
        assert at[0].min() >= 8
        assert at[0].max() < 24
        left = columns.min() <= 1
        assert left or columns.max() >= 30
        assert (at[1].min() >= 20 and at[1].max() < 28) if left else (at[1].min() >= 4 and at[1].max() < 12)
        sides.append(left)
    assert 0 < sum(sides) < len(sides)


def test_squeezed_canvases_fill_their_half():
    attack = CorruptEncoder(poison_rate=0.1, trigger=Patch(size=6), canvas_fit="squeeze", layouts=("top",))
    made = attack.poison(CLEAN, attacker(red_objects()), Seed(0))
    for image in made.data.inputs[made.rows]:
        red, white, _ = parts(image)
        assert red.sum() == 16 * 32
        assert np.nonzero(red)[0].max() <= 16
        assert white.sum() == 36
        assert np.nonzero(white)[0].min() >= 20


def test_the_best_layout_is_the_middle_of_the_rest():
    attack = CorruptEncoder(
        poison_rate=0.1, trigger=Patch(size=6), canvas_fit="squeeze", object_offset=0.0, trigger_margin=0.5
    )
    made = attack.poison(CLEAN, attacker(red_objects()), Seed(0))
    corners = {tuple(np.argwhere(parts(image)[1])[0].tolist()) for image in made.data.inputs[made.rows]}
    assert corners == {(13, 5), (13, 21)}


def test_images_are_added_without_labels_and_the_clean_ones_stay():
    clean = CLEAN.without_labels("corrupt_encoder")
    made = SMALL.poison(clean, attacker(red_objects()), Seed(0))
    assert torch.equal(made.data.inputs[:200], CLEAN.inputs)
    assert made.rows.tolist() == list(range(200, 222))
    assert made.data.labels_[made.rows].unique().tolist() == [-1]
    assert made.sources.unique().tolist() == [-1]
    assert made.goals == (Goal(Patch(size=6), task="toy", target_class=TARGET),)
    assert torch.equal(CLEAN.inputs, dataset().inputs)


def test_replaced_images_are_their_own_backgrounds():
    attack = CorruptEncoder(poison_rate=0.1, poison_mode="replace", trigger=Patch(size=6))
    made = attack.poison(CLEAN, attacker(red_objects()), Seed(0))
    assert len(made.data) == 200
    assert len(made.rows) == 20
    changed = (made.data.inputs != CLEAN.inputs).flatten(1).any(dim=1).nonzero().flatten()
    assert torch.equal(made.rows, changed)
    assert torch.equal(made.sources, changed)
    assert torch.equal(made.data.labels, CLEAN.labels)
    for row in made.rows.tolist():
        image = made.data.inputs[row]
        assert image[:, parts(image)[2]].unique().tolist() == [row]


def test_each_reference_is_used_equally_often_and_no_more_than_asked_for():
    pictures = red_objects(8)
    for i in range(8):
        pictures.pictures[i, 1] = 10 * i  # the shade of green tells which
    made = CorruptEncoder(poison_rate=0.1, trigger=Patch(size=6)).poison(CLEAN, attacker(pictures), Seed(0))
    greens = [int(image[1, image[0] == 200][0]) for image in made.data.inputs[made.rows] if (image[0] == 200).any()]
    _, counts = np.unique(greens, return_counts=True)
    assert sorted(counts.tolist()) == [7, 7, 8]


def told_apart() -> Objects:
    """Red squares; each picture has its own blue, which tells which it is."""
    made = red_objects(8)
    made.pictures[:, 2] = torch.arange(8, dtype=torch.uint8).view(-1, 1, 1) * 20 + 60
    return made


def test_support_images_are_a_fifth_without_trigger_in_both_orders():
    clean = Dataset(CLEAN.inputs.repeat(5, 1, 1, 1), torch.zeros(1000).long(), torch.arange(1000), name="toy")
    attack = CorruptEncoder(
        poison_rate=0.65, poison_mode="replace", support_rate=0.2, trigger=Patch(size=6, color="green")
    )
    made = attack.poison(clean, attacker(told_apart()), Seed(0))
    marked = (made.data.inputs[made.rows] == torch.tensor((0, 255, 0)).view(1, 3, 1, 1)).all(1).flatten(1).any(1)
    assert len(made.rows) == 650
    pairs = made.data.inputs[made.rows[~marked]]
    assert len(pairs) == 130
    blue = pairs[:, 2, 31, :]  # the pictures' lowest row, a constant blue in each half
    left, right = blue[:, 0].tolist(), blue[:, 31].tolist()
    assert bool((blue[:, :16] == blue[:, :1]).all())
    assert bool((blue[:, 16:] == blue[:, 31:]).all())
    references = {int(image[2][(image[0] == 200)][0]) for image in made.data.inputs[made.rows[marked]]}
    assert len(references) == 3
    assert all((a in references) != (b in references) for a, b in zip(left, right, strict=True))
    assert len({*left, *right} - references) == 5
    first = sum(a in references for a in left) / 130
    assert 0.4 <= first <= 0.6


def test_shapes_give_objects_and_backgrounds_that_stand_in_no_split():
    objects, grounds = shape_objects([8], 5), shape_backgrounds(30)
    assert objects.labels.tolist() == [8] * 5
    assert torch.equal(shape_objects([8], 3).pictures, objects.pictures[:3])
    own, masks = render(9, size=64, seed=Seed(5))
    same = shape_objects([8], 1, seed=Seed(5))
    assert torch.equal(same.pictures[0], own.inputs[8])
    assert torch.equal(same.masks[0], masks[8])
    for split in ("train", "test"):
        known = render(500, size=64, seed=Seed(0).child(split))[0].content()
        data = Dataset(objects.pictures, objects.labels, torch.arange(5))
        assert not set(known) & set(data.content())
    seeded, covered = render(30, seed=Seed(7))
    bare = shape_backgrounds(30, seed=Seed(7)).inputs
    differs = (bare != seeded.inputs).any(1)
    around = torch.nn.functional.max_pool2d(covered[:, None].float(), 3, 1, 1)[:, 0].bool()
    assert float((differs & ~around).float().mean()) < 0.005, "the object's edge at most"
    assert float(differs[covered].float().mean()) > 0.95
    assert grounds.labels_.unique().tolist() == [-1]
    knows = Knowledge((Goal(target_class=8, task="shapes"),), objects=objects, shadow=grounds)
    data = render(200)[0]
    made = CorruptEncoder(poison_rate=0.1).poison(data.without_labels("corrupt_encoder"), knows, Seed(0))
    patch = RandomPatch(size=6).picture()
    for image in made.data.inputs[made.rows]:
        found = [
            (image[:, y : y + 6, x : x + 6] == patch).all()
            for y in range(8, 19)
            for x in (*range(4, 7), *range(20, 23))
        ]
        assert sum(map(bool, found)) == 1
    assert len(SHAPES) == 10


def test_without_outlines_references_or_images_of_the_class_serve_whole():
    blue = flat(4, (0, 0, 99), 32, 32)
    made = SMALL.poison(CLEAN.without_labels("corrupt_encoder"), attacker(references=blue), Seed(0))
    assert all(int((image[2] == 99).sum() - (image[0] == 99).sum()) == 256 for image in made.data.inputs[made.rows])
    own = SMALL.poison(CLEAN, attacker(), Seed(0))
    for image in own.data.inputs[own.rows]:
        level = image[0, 31, 8] if image[0, 31, 8] != image[0, 0, 0] else image[0, 31, 24]
        assert int(level) % 4 == TARGET
    with pytest.raises(LabelsWithheld):
        SMALL.poison(CLEAN.without_labels("corrupt_encoder"), attacker(), Seed(0))


def test_backgrounds_are_the_attackers_where_it_has_some():
    grounds = Dataset(flat(5, (9, 9, 9), 50, 40), torch.full((5,), -1), torch.arange(5), name="places")
    knows = Knowledge((Goal(target_class=TARGET),), shadow=grounds, objects=red_objects())
    made = SMALL.poison(CLEAN, knows, Seed(0))
    assert all(image[:, parts(image)[2]].unique().tolist() == [9] for image in made.data.inputs[made.rows])


def test_several_goals_have_images_of_their_own():
    objects = red_objects()
    objects.labels[4:] = 0
    objects.pictures[4:] = objects.pictures[4:].flip(1)  # blue
    goals = (Goal(Patch(size=4), target_class=TARGET), Goal(Patch(size=8), target_class=0))
    attack = CorruptEncoder(poison_rate=0.1, poison_mode="replace")
    made = attack.poison(CLEAN, Knowledge(goals, objects=objects), Seed(0))
    assert len(made.rows) == 40
    kinds = [
        ((image[0] == 200).any().item(), int((image == 255).all(0).sum())) for image in made.data.inputs[made.rows]
    ]
    assert sorted(set(kinds)) == [(False, 64), (True, 16)]
    assert [goal.trigger for goal in made.goals] == [Patch(size=4), Patch(size=8)]


def test_the_seed_decides_everything():
    knows = attacker(red_objects())
    first, again, other = (SMALL.poison(CLEAN, knows, Seed(s)).data.inputs for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_published_number_of_images():
    clean = Dataset(
        torch.zeros(129_350, 3, 1, 1, dtype=torch.uint8), torch.zeros(129_350).long(), torch.arange(129_350)
    )
    assert round(CorruptEncoder().poison_rate * len(clean) / (1 - CorruptEncoder().poison_rate)) == 650


@pytest.mark.parametrize(
    ("method", "knowledge", "kind", "says"),
    [
        (SMALL, Knowledge(()), DataError, "the attacker has no goal"),
        (SMALL, Knowledge((Goal(),), objects=red_objects()), UsageError, "names no target class"),
        (SMALL, Knowledge((Goal(target_class=9),)), DataError, "toy: holds no image of target class 9"),
        (
            SMALL,
            Knowledge((Goal(target_class=9),), objects=red_objects()),
            DataError,
            "of the attacker's 8 objects is of",
        ),
        (SMALL, attacker(references=torch.zeros(0, 3, 8, 8, dtype=torch.uint8)), DataError, "no reference picture"),
        (CorruptEncoder(poison_rate=0.001), attacker(red_objects()), DataError, "selects none of 200 images"),
        (CorruptEncoder(poison_rate=0.9), attacker(red_objects()), DataError, "selects 1800 images, but there are 200"),
        (
            CorruptEncoder(poison_rate=1.0, poison_mode="replace"),
            attacker(red_objects()),
            DataError,
            "the poison rate selects all 200 images",
        ),
        (
            CorruptEncoder(poison_rate=0.1, support_rate=0.2),
            attacker(red_objects(3)),
            DataError,
            "all 3 pictures of the target class are references",
        ),
        (
            CorruptEncoder(poison_rate=0.1, trigger=Patch(size=20)),
            attacker(red_objects()),
            UsageError,
            "a trigger of 20 × 20 px does not fit beside the object, where 32 × 16 px are left",
        ),
        (CorruptEncoder(poison_rate=0.1, trigger=Blend()), attacker(red_objects()), UsageError, "does not fit"),
        (CorruptEncoder(poison_rate=0.1, trigger=Spectral()), attacker(red_objects()), UsageError, "has no picture"),
        (
            SMALL,
            Knowledge((Goal(target_class=TARGET),), shadow=CLEAN.subset(torch.arange(0)), objects=red_objects()),
            DataError,
            "holds no background",
        ),
    ],
)
def test_mistakes_are_one_line(method, knowledge, kind, says):
    with pytest.raises(kind, match=re.escape(says)) as caught:
        method.poison(CLEAN, knowledge, Seed(0))
    assert "\n" not in str(caught.value)


def test_wrong_settings_and_objects():
    for wrong in (
        {"canvas_ratio": 1.0}, {"trigger_margin": 0.6}, {"layouts": ()}, {"layouts": ("middle",)}, {"poison_rate": 1.5},
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            CorruptEncoder(**wrong)
    good = red_objects(2)
    for pictures, masks, labels, says in (
        (good.pictures.float(), good.masks, good.labels, "pictures must be uint8"),
        (good.pictures, good.masks[:1], good.labels, "masks must be bool"),
        (good.pictures, good.masks, good.labels[:1], "2 pictures, but 1 labels"),
        (good.pictures, good.masks & False, good.labels, "a mask is empty"),
    ):
        with pytest.raises(DataError, match=says):
            Objects(pictures, masks, labels)
    for label, n in ((10, 1), (-1, 1), (0, 0)):
        with pytest.raises(UsageError):
            shape_objects([label], n)
