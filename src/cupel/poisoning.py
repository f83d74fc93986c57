"""What attacks on the training data share: which rows are taken, and a data set with the poisoned images in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cupel.errors import DataError, UsageError
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, settings
from cupel.triggers.draws import uniforms
from cupel.types import Dataset, Goal, Knowledge, Poisoned

__all__ = [
    "LabelFlip",
    "PoisonMode",
    "appended",
    "by_lot",
    "chosen_rows",
    "count_of",
    "members_of",
    "poisoned",
    "share_of",
    "stamped",
    "targets_of",
    "within_budget",
]

PoisonMode = Literal["replace", "add"]
"""`replace` = a poisoned image takes the place of the clean one; `add` = it is appended under a new id."""


def targets_of(attacker: Knowledge, attack: str) -> list[int]:
    """The target class of each goal.

    Raises:
        DataError: no goal.
        UsageError: a goal names no target class, or two name the same.
    """
    if not attacker.goals:
        raise DataError(attack, "the attacker has no goal", "name a target class")
    targets = [goal.target_class for goal in attacker.goals if goal.target_class is not None]
    if len(targets) < len(attacker.goals):
        raise UsageError(attack, "the goal names no target class", "add `target_class: …`")
    if len(set(targets)) < len(targets):
        raise UsageError(attack, "two goals have the same target class", "give each goal its own")
    return targets


def members_of(clean: Dataset, target: int) -> Tensor:
    """Rows of one class, int64, ascending.

    Raises:
        DataError: there are none.
    """
    members = (clean.labels == target).nonzero().flatten()
    if not len(members):
        what = f"holds no image of target class {target}"
        raise DataError(clean.name, what, f"choose one of {sorted(set(clean.labels.tolist()))[:20]}")
    return members


def chosen_rows(ids: list[int], rate: float, seed: Seed) -> Tensor:
    """Positions of `round(rate · n)` of the given ids, ascending; a random choice without repetition.

    Which ids are chosen depends on (seed, set of ids), not on their order. Halves round to the even number.

    Example:
        >>> len(chosen_rows(list(range(10)), 0.5, Seed(0)))
        5
    """
    return by_lot(ids, round(rate * len(ids)), seed)


def by_lot(ids: list[int], count: int, seed: Seed) -> Tensor:
    """Positions of `count` of the given ids, ascending; a random choice without repetition, by (seed, id).

    Example:
        >>> len(by_lot(list(range(10)), 3, Seed(0)))
        3
    """
    lots = uniforms(seed, ids, 1)[:, 0]
    return torch.from_numpy(np.sort(np.argsort(lots, kind="stable")[:count]))


def share_of(clean: Dataset, rows: Tensor, rate: float, seed: Seed, setting: str, whose: str) -> Tensor:
    """`round(rate · n)` of `rows`, drawn by id, ascending.

    Args:
        clean: The data.
        rows: Candidates, int64.
        rate: In [0, 1].
        seed: Of the draw.
        setting: Name of the rate, for the error.
        whose: What the candidates are, for the error: "images of class 3".

    Raises:
        DataError: the rate selects none.
    """
    pick = rows[chosen_rows(clean.ids[rows].tolist(), rate, seed)]
    if not len(pick):
        what = f"{setting} {rate:g} selects none of {len(rows)} {whose}"
        raise DataError(clean.name, what, "choose a larger rate")
    return pick


def count_of(rate: float, n: int, mode: PoisonMode) -> int:
    """Poisoned images when they are to be `rate` of all images as trained on.

    Example:
        >>> count_of(0.1, 90, "replace"), count_of(0.1, 90, "add")
        (9, 10)
    """
    return round(rate * n if mode == "replace" or rate == 1 else rate * n / (1 - rate))


def within_budget(clean: Dataset, count: int, candidates: Tensor, rate: float, whose: str) -> None:
    """Refuse a `poison_rate` that selects no image, or more than there are.

    Args:
        clean: The data, for the error.
        count: Images that the rate selects.
        candidates: Rows they are taken from.
        rate: In [0, 1].
        whose: What the candidates are: "images of class 3".

    Raises:
        DataError: see above.
    """
    if count < 1:
        raise DataError(clean.name, f"poison_rate {rate:g} selects none of {len(clean)} images", "choose a larger rate")
    if count > len(candidates):
        what = f"poison_rate {rate:g} selects {count} images, but there are {len(candidates)} {whose}"
        raise DataError(clean.name, what, "choose a smaller rate")


def stamped(clean: Dataset, rows: Tensor, trigger: Trigger[Tensor], seed: Seed) -> Tensor:
    """The given images with the trigger on them, uint8."""
    return trigger(clean.inputs[rows], clean.ids[rows].tolist(), seed)


def poisoned(
    clean: Dataset,
    rows: Tensor,
    images: Tensor,
    mode: PoisonMode,
    goals: tuple[Goal, ...],
    labels: Tensor | None = None,
) -> Poisoned:
    """The data set with poisoned copies of some of its images.

    Args:
        clean: Left as it is.
        rows: int64, which images were poisoned; each at most once.
        images: uint8 `[rows, 3, height, width]`, in that order.
        mode: In place of the clean ones, or beside them.
        goals: With the triggers of test time.
        labels: int64 `[rows]`, what the poisoned images are labelled; None = as before.

    Returns:
        The data and its poisoned rows, ascending.

    Raises:
        DataError: every image would be replaced.
    """
    if mode == "replace" and len(rows) == len(clean):
        raise DataError(clean.name, f"the poison rate selects all {len(clean)} images", "choose a smaller rate")
    order = rows.argsort()
    rows, images = rows[order], images[order]
    marked = clean.labels_[rows] if labels is None else labels[order]
    if mode == "add":
        return appended(clean, images, marked, goals, rows)
    inputs = _all(clean).clone()
    inputs[rows] = images
    relabelled = clean.labels_.clone()
    relabelled[rows] = marked
    data = dataclasses.replace(clean, inputs=inputs, labels_=relabelled, name=f"{clean.name} (poisoned)")
    return Poisoned(data, rows, goals, rows)


def appended(
    clean: Dataset, images: Tensor, labels: Tensor, goals: tuple[Goal, ...], sources: Tensor | None = None
) -> Poisoned:
    """The data set with further images at its end, under new ids.

    Args:
        clean: Left as it is.
        images: uint8 `[n, 3, height, width]`.
        labels: int64 `[n]`; −1 = none.
        goals: With the triggers of test time.
        sources: int64 `[n]`, rows of the images they were made from; None = they are new.
    """
    added = torch.arange(len(images))
    data = dataclasses.replace(
        clean,
        inputs=torch.cat([_all(clean), images]),
        labels_=torch.cat([clean.labels_, labels]),
        ids=torch.cat([clean.ids, clean.ids.max() + 1 + added]),
        name=f"{clean.name} (poisoned)",
    )
    made_from = torch.full((len(images),), -1) if sources is None else sources
    return Poisoned(data, len(clean) + added, goals, made_from)


@settings
class LabelFlip:
    """Settings of attacks that put a trigger on images of any class and label them as the target class.

    Args:
        poison_rate: p in [0, 1], poisoned images per goal over all images as trained on. They are drawn from all
            classes, the target class included, so about p · N / classes of them keep the label they had.
        poison_mode: `replace` = the triggered image takes the place of the clean one; `add` = triggered copies are
            appended under new ids.
        clean_label: Draw the images from the target class alone and leave all labels as they are.

    Labels matter to supervised training only. Self-supervised training sees triggered images of all classes, and
    nothing says that they belong together except the trigger; with `clean_label` they are images of one class, and
    the trigger may come to stand for it, as it does in SSL-Backdoor.
    """

    poison_rate: Fraction = 0.1
    poison_mode: PoisonMode = "replace"
    clean_label: bool = False

    def flipped(
        self, clean: Dataset, attacker: Knowledge, own: Callable[[], Trigger[Tensor]], seed: Seed, attack: str
    ) -> Poisoned:
        """The poisoned training data; the triggers of test time are those of training. No image bears two triggers.

        Args:
            clean: Labelled; left as it is.
            attacker: Goals; the labels of their target classes are those of `clean`.
            own: Gives the trigger of goals that bring none.
            seed: Choice of images, and triggers.
            attack: Name, for errors.

        Raises:
            UsageError: a goal names no target class, or two name the same; the trigger does not fit into the images.
            DataError: no goal; the target class is absent; the rate selects no image, every image, or more than there
                are.
        """
        targets = targets_of(attacker, attack)
        count, free = count_of(self.poison_rate, len(clean), self.poison_mode), torch.ones(len(clean), dtype=torch.bool)
        members = [members_of(clean, target) for target in targets]
        picks: list[Tensor] = []
        for i, target in enumerate(targets):
            rows = members[i] if self.clean_label else free.nonzero().flatten()
            whose = f"images of class {target}" if self.clean_label else "images that bear no trigger yet"
            within_budget(clean, count, rows, self.poison_rate, whose)
            picks.append(rows[by_lot(clean.ids[rows].tolist(), count, seed.child("choose", i))])
            free[picks[-1]] = False
        rows = torch.cat(picks)
        if self.poison_mode == "replace" and len(rows) == len(clean):
            raise DataError(clean.name, f"the poison rate selects all {len(clean)} images", "choose a smaller rate")
        goals = tuple(
            dataclasses.replace(goal, trigger=own() if goal.trigger is None else goal.trigger)
            for goal in attacker.goals
        )
        images = []
        for i, (goal, pick) in enumerate(zip(goals, picks, strict=True)):
            assert goal.trigger is not None
            images.append(stamped(clean, pick, goal.trigger, seed.child("place", i)))
        wanted = torch.tensor(targets).repeat_interleave(count)
        labels = None if self.clean_label else wanted
        return poisoned(clean, rows, torch.cat(images), self.poison_mode, goals, labels)


def _all(clean: Dataset) -> Tensor:
    return clean.inputs if isinstance(clean.inputs, Tensor) else clean.inputs[torch.arange(len(clean))]
