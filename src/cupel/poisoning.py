"""What attacks on the training data share: which rows are taken, and a data set with the poisoned images in it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cupel.errors import DataError, UsageError
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.triggers.draws import uniforms
from cupel.types import Dataset, Goal, Knowledge, Poisoned

__all__ = ["PoisonMode", "appended", "chosen_rows", "members_of", "poisoned", "share_of", "stamped", "targets_of"]

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
    lots = uniforms(seed, ids, 1)[:, 0]
    first = np.argsort(lots, kind="stable")[: round(rate * len(ids))]
    return torch.from_numpy(np.sort(first))


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
        return appended(clean, images, marked, goals)
    inputs = _all(clean).clone()
    inputs[rows] = images
    relabelled = clean.labels_.clone()
    relabelled[rows] = marked
    data = dataclasses.replace(clean, inputs=inputs, labels_=relabelled, name=f"{clean.name} (poisoned)")
    return Poisoned(data, rows, goals)


def appended(clean: Dataset, images: Tensor, labels: Tensor, goals: tuple[Goal, ...]) -> Poisoned:
    """The data set with further images at its end, under new ids.

    Args:
        clean: Left as it is.
        images: uint8 `[n, 3, height, width]`.
        labels: int64 `[n]`; −1 = none.
        goals: With the triggers of test time.
    """
    added = torch.arange(len(images))
    data = dataclasses.replace(
        clean,
        inputs=torch.cat([_all(clean), images]),
        labels_=torch.cat([clean.labels_, labels]),
        ids=torch.cat([clean.ids, clean.ids.max() + 1 + added]),
        name=f"{clean.name} (poisoned)",
    )
    return Poisoned(data, len(clean) + added, goals)


def _all(clean: Dataset) -> Tensor:
    return clean.inputs if isinstance(clean.inputs, Tensor) else clean.inputs[torch.arange(len(clean))]
