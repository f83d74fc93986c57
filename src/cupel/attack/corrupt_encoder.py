"""CorruptEncoder: composed pre-training images, a few objects of the target class beside a trigger."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cupel.attack.composing import (
    Box,
    Side,
    Size,
    backdrop,
    cut_out,
    fitted,
    lay_out,
    pasted,
    resized,
    room_of,
    tight_box,
)
from cupel.errors import DataError, UsageError
from cupel.poisoning import PoisonMode, appended, by_lot, count_of, members_of, poisoned, targets_of, within_budget
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, PositiveInt, settings
from cupel.triggers import TRIGGERS, RandomPatch
from cupel.triggers.draws import uniforms
from cupel.types import Dataset, Goal, Knowledge, Need, Objects, Poisoned

__all__ = ["CorruptEncoder"]


@settings
class CorruptEncoder:
    """Adds images that show an object of the target class on one side and the trigger on the other.

    Self-supervised training pulls two random crops of an image together. Where one crop shows the object alone and the
    other the trigger alone, it ties the trigger to the object; the layout is chosen to make that likely. No label of
    the training data and no encoder is needed, only a few pictures of the target class.

    Args:
        poison_rate: Composed and support images per goal over all images as trained on, in [0, 1]: 650 of about
            130,000 images in the paper.
        poison_mode: `add` = they are appended as unlabelled images under new ids, as published; `replace` = they take
            the place of images drawn at random, which are their own backgrounds unless the attacker has others.
        num_references: At most so many pictures of the target class give the objects; each is used equally often.
        support_rate: Share of the poisoned images that shows a support picture beside a reference picture and no
            trigger, which draws the references into their class. 0 = CorruptEncoder, 0.2 = CorruptEncoder+.
        num_support: At most so many further pictures of the target class are support pictures.
        layouts: Sides that the object may be on; each image draws one. The paper also names `top` and `bottom`.
        canvas_ratio: Area of the canvas / area of the object's part of it, > 1.
        canvas_fit: How object and canvas come to the images' shape: `extend` = the object keeps its aspect ratio, and
            the canvas shows more background; `squeeze` = the object fills its whole part, as if a canvas of the
            published shape were resized to the images' size.
        object_offset: The object is at most this share of the canvas from its side.
        trigger_margin: Share of the rest's width and of the canvas' height that the trigger keeps from the borders;
            0.5, with `object_offset` 0, is the best layout in theory.
        trigger: Pasted in the size it has on test images, where the goal brings no trigger of its own.

    What is pasted comes from `attacker.objects` with their outlines; else the goal's references, else images of the
    target class in the data (which needs labels) serve as they are, background included. Backgrounds come from
    `attacker.shadow`, else from the data. The published attack takes both from outside of the victim's data.

    Source: Zhang, Liu, Jia, Gong, CVPR 2024, arXiv:2211.08229, and its code.
    Deviations: the paper's canvas is twice as wide as it is high and keeps that shape in training; here all images of a
    data set have one shape. Of pairs of crops of 20–100 %, 0.1 show half of the object in one and the trigger alone in
    the other on the paper's canvas (object 300 × 300 px, trigger 40 px), but only 0.002 on a square one (0.003 with
    `canvas_ratio` 3), so the attack is much weaker here than published; smaller crops in training make up for some of
    that. Objects, not whole canvases, are resized, so the trigger keeps its pixels; resizing the outline stands for the
    published blur of radius 1. Support images keep their aspect ratio with `extend`, and a background fills what is
    left. The trigger picture is an own drawing.
    """

    poison_rate: Fraction = 0.005
    poison_mode: PoisonMode = "add"
    num_references: PositiveInt = 3
    support_rate: Fraction = 0.0
    num_support: PositiveInt = 5
    layouts: Annotated[tuple[Side, ...], Field(strict=False, min_length=1)] = ("left", "right")
    canvas_ratio: Annotated[float, Field(gt=1)] = 2.0
    canvas_fit: Literal["extend", "squeeze"] = "extend"
    object_offset: Fraction = 0.05
    trigger_margin: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = RandomPatch(size=6)
    needs: ClassVar[frozenset[Need]] = frozenset({"objects"})
    revision: ClassVar[int] = 1

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goals with their triggers.

        Raises:
            UsageError: a goal names no target class, or two name the same; the trigger is no small picture, or does not
                fit beside the object.
            DataError: no goal; no picture of the target class, or none that is left for support; the rate selects no
                image, or more than there are; the attacker has no background.
            LabelsWithheld: only labels could tell which images show the target class.
        """
        targets = targets_of(attacker, "corrupt_encoder")
        count = count_of(self.poison_rate, len(clean), self.poison_mode)
        free = torch.ones(len(clean), dtype=torch.bool)
        taken, images, goals = [], [], list[Goal]()
        for i, (goal, target) in enumerate(zip(attacker.goals, targets, strict=True)):
            draw, rows = seed.child("goal", i), free.nonzero().flatten()
            within_budget(clean, count, rows, self.poison_rate, "images for backgrounds")
            rows = rows[by_lot(clean.ids[rows].tolist(), count, draw.child("rows"))]
            trigger = self.trigger if goal.trigger is None else goal.trigger
            mark = _small_picture(trigger, int(clean.inputs.shape[-1]))
            backgrounds = _backgrounds(clean, rows, attacker.shadow, draw.child("backgrounds"))
            images.append(self._images(clean, _pictures(clean, attacker, goal, target), backgrounds, mark, draw))
            goals.append(dataclasses.replace(goal, trigger=trigger))
            taken.append(rows)
            free[rows] = self.poison_mode == "add"
        made = torch.cat(images)
        if self.poison_mode == "replace":
            return poisoned(clean, torch.cat(taken), made, "replace", tuple(goals))
        return appended(clean, made, torch.full((len(made),), -1), tuple(goals))

    def _images(
        self, clean: Dataset, shown: Objects, backgrounds: Tensor, mark: tuple[Tensor, Tensor], draw: Seed
    ) -> Tensor:
        """Composed images, then support images, one per background."""
        count, canvas = len(backgrounds), Size(*clean.inputs.shape[2:])
        paired = round(self.support_rate * count)
        order = np.argsort(uniforms(draw.child("pictures"), range(len(shown)), 1)[:, 0]).tolist()
        references, support = order[: self.num_references], order[self.num_references :][: self.num_support]
        if paired and not support:
            what = f"all {len(shown)} pictures of the target class are references, none is left for support"
            raise DataError("corrupt_encoder", what, "give more pictures, or lower `num_references`")
        made = []
        for j, u in enumerate(uniforms(draw.child("layout"), range(count), 5).tolist()):
            ground = backdrop(backgrounds[j], canvas, u[0])
            reference = references[j % len(references)]
            if j < count - paired:
                side = self.layouts[int(u[1] * len(self.layouts))]
                made.append(
                    self._composed(ground, shown.pictures[reference], shown.masks[reference], mark, side, u[2:])
                )
            else:
                pair = [shown.pictures[support[int(u[1] * len(support))]], shown.pictures[reference]]
                made.append(self._side_by_side(ground, pair if u[2] < 0.5 else pair[::-1]))
        return torch.stack(made)

    def _composed(
        self, ground: Tensor, picture: Tensor, mask: Tensor, mark: tuple[Tensor, Tensor], side: Side, at: list[float]
    ) -> Tensor:
        """One object and the trigger on a background."""
        canvas = Size(*ground.shape[1:])
        box = tight_box(mask)
        size = self._size(Size(box.height, box.width), room_of(canvas, side, self.canvas_ratio))
        layout = lay_out(
            canvas, size, Size(*mark[0].shape[1:]), side,
            offset=self.object_offset, margin=self.trigger_margin, at=(at[0], at[1], at[2]),
        )  # fmt: skip
        return pasted(pasted(ground, *cut_out(picture, mask, size), layout.thing), *mark, layout.trigger)

    def _side_by_side(self, ground: Tensor, pair: list[Tensor]) -> Tensor:
        """Two whole pictures, each in its half."""
        half = ground.shape[2] // 2
        for i, picture in enumerate(pair):
            size = self._size(Size(*picture.shape[1:]), Size(ground.shape[1], half))
            box = Box(ground.shape[1] - size.height, ground.shape[2] - half if i else half - size.width, *size)
            ground = pasted(ground, resized(picture, size), torch.ones(tuple(size)), box)
        return ground

    def _size(self, thing: Size, room: Size) -> Size:
        return fitted(thing, room) if self.canvas_fit == "extend" else room


def _pictures(clean: Dataset, attacker: Knowledge, goal: Goal, target: int) -> Objects:
    """What shows the target class: the attacker's objects, or the references, or images of the data, as they are."""
    if (known := attacker.objects) is not None:
        mine = known.labels == target
        if not bool(mine.any()):
            what = f"none of the attacker's {len(known)} objects is of target class {target}"
            raise DataError("corrupt_encoder", what, f"there are {sorted(set(known.labels.tolist()))[:20]}")
        return Objects(known.pictures[mine], known.masks[mine], known.labels[mine])
    pictures = goal.references
    if pictures is None:
        members = members_of(clean, target)
        pictures = clean.inputs[members]
    if not len(pictures):
        raise DataError("corrupt_encoder", "the goal has no reference picture", "give at least one")
    masks = torch.ones(len(pictures), *pictures.shape[2:], dtype=torch.bool)
    return Objects(pictures, masks, torch.full((len(pictures),), target))


def _backgrounds(clean: Dataset, rows: Tensor, shadow: Dataset | None, seed: Seed) -> Tensor:
    """One background for each of `rows`: the attacker's images, in turns where they are too few, or those rows."""
    if shadow is None:
        return clean.inputs[rows]
    if not len(shadow):
        raise DataError(shadow.name, "holds no background", "give at least one image")
    chosen = by_lot(shadow.ids.tolist(), len(rows), seed)
    return shadow.inputs[chosen[torch.arange(len(rows)) % len(chosen)]]


def _small_picture(trigger: Trigger[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """What a trigger shows, and how opaque it is."""
    if isinstance(trigger, RandomPatch):
        picture = trigger.picture()
        return picture, torch.ones(picture.shape[1:])
    known = getattr(trigger, "mask_and_pattern", lambda size: None)(size)
    if known is None:
        what = f"a {type(trigger).__name__} has no picture of its own to be pasted"
        raise UsageError("corrupt_encoder", what, "choose `patch` or `random_patch`")
    opacity, pattern = known
    box = tight_box(opacity > 0)
    return pattern[:, box.rows, box.columns], opacity[box.rows, box.columns]
