"""Which images each role gets, and the check that the splits overlap nothing they must not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cupel import data as sources
from cupel.errors import DataError
from cupel.metrics import check_target
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["check_splits", "images_of"]

_POOL_PER_CLASS = 10  # images of each class that are set aside as possible references


@functools.lru_cache(maxsize=8)
def _load(source: str, split: str, size: int, limit: int | None, seed: Seed) -> Dataset:
    return sources.load(source, split=split, size=size, limit=limit, seed=seed)


@functools.lru_cache(maxsize=8)
def _held_out(source: str, size: int, seed: Seed) -> tuple[Dataset, Dataset]:
    """The whole training split as (kept, reference pool); the pool depends on source and seed alone."""
    whole = _load(source, "train", size, None, seed)
    return sources.hold_out(whole, _POOL_PER_CLASS, seed.child("pool"))


def _without(data: Dataset, pool: Dataset) -> Dataset:
    taken = set(pool.content())
    return data.subset(torch.tensor([one not in taken for one in data.content()]))


def _some(data: Dataset, n: int | None, seed: Seed) -> Dataset:
    if n is None or n >= len(data):
        return data
    rows: Tensor = torch.randperm(len(data), generator=seed.torch())[:n]
    return data.subset(rows.sort().values)


def _of_classes(data: Dataset, classes: Sequence[int]) -> Dataset:
    """The images of some classes, which are numbered by their place in the list."""
    labels = torch.full_like(data.labels_, -1)
    for i, one in enumerate(classes):
        check_target(one, data)
        labels[data.labels_ == one] = i
    names = tuple(data.classes[one] for one in classes) if data.classes else tuple(map(str, classes))
    kept = (labels >= 0).nonzero().flatten()
    return dataclasses.replace(data.subset(kept), labels_=labels[kept], classes=names)


def images_of(method: Mapping[str, Any], seed: Seed) -> Dataset:
    """The images of one role.

    Args:
        method: Role, source, split, side of the images, limit; see `plan`.
        seed: Seed of all data of the experiment, so that roles agree on the reference pool.
    """
    role, source, size, limit = method["role"], method["source"], method["size"], method["limit"]
    if role == "test":
        made = _load(source, "test", size, limit, seed)
    elif role in ("pool", "train", "labelled"):
        kept, pool = _held_out(source, size, seed)
        made = pool if role == "pool" else _some(kept, limit, seed.child(role))
    else:
        # the attacker's and the defender's images are drawn from the pre-training images where no other source is named
        first = limit if role == "pre-training" else method["within"]
        made = _load(source, "train", size, first, seed)
        if method.get("outside"):  # rendered images are added to, others are drawn from the whole set
            taken = method["outside"]
            rows = taken + (limit or taken) if source == "shapes" else None
            made = _without(_load(source, "train", size, rows, seed), _load(source, "train", size, taken, seed))
        for other in method["without"]:
            made = _without(made, _held_out(other, size, seed)[1])
        if method.get("classes"):
            made = _of_classes(made, method["classes"])
        if role != "pre-training":
            made = _some(made, limit, seed.child(role))
    return made.subset(torch.arange(len(made)), name=f"{source} ({role})")


def check_splits(named: Sequence[tuple[Mapping[str, Any], Dataset]]) -> dict[str, Any]:
    """Refuse test images or references that stand in any other split; say what does overlap by design.

    Returns:
        Sizes by role, and whether the shadow set is the pre-training set.

    Raises:
        DataError: an overlap; the line names the two sets.
    """
    guarded = [(m, d) for m, d in named if m["role"] in ("test", "pool")]
    for method, data in guarded:
        for other_method, other in named:
            if other is data or (method["role"] == "pool" and other_method["role"] == "pool"):
                continue
            sources.check_disjoint(**{data.name: data, other.name: other})
    by_role = {d.name: len(d) for _, d in named}
    pretraining = next(d for m, d in named if m["role"] == "pre-training")
    shadow = next(d for m, d in named if m["role"] == "shadow")
    if not len(shadow):
        raise DataError(shadow.name, "is empty")
    inside = set(pretraining.content())
    shared = sum(one in inside for one in shadow.content())
    return {"images": by_role, "shadow_in_pretraining": shared / len(shadow)}
