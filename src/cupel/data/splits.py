"""Splits that overlap nothing they must not, and the draws that respect it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from cupel.errors import DataError, UsageError
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["check_disjoint", "draw_references", "hold_out"]

_SHOWN, _BLOCK = 3, 512


def check_disjoint(**named: Dataset) -> None:
    """Make sure that no image stands in two of the data sets. Images are compared by content, not by row number.

    Images that are decoded lazily are compared by their encoded bytes among themselves, by their pixels with others.

    Raises:
        DataError: the line names the two sets, how many images they share and the first ids.

    Example:
        >>> grey = Dataset(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1).long(), torch.tensor([7]))
        >>> check_disjoint(train=grey, test=grey.subset(torch.tensor([0])))
        Traceback (most recent call last):
        cupel.errors.DataError: train and test: share 1 image (ids 7 and 7); choose sources or splits without overlap
    """
    lazy = [not isinstance(data.inputs, Tensor) for data in named.values()]
    mixed = any(lazy) and not all(lazy)
    content = {name: _pixels(data) if mixed else data.content() for name, data in named.items()}
    for one, other in combinations(named, 2):
        shared = sorted(set(content[one]) & set(content[other]))
        if shared:
            pairs = sorted((content[one].index(d), content[other].index(d)) for d in shared)[:_SHOWN]
            ids = [", ".join(str(int(named[n].ids[p[k]])) for p in pairs) for k, n in enumerate((one, other))]
            raise DataError(
                f"{one} and {other}",
                f"share {len(shared)} image{'s' * (len(shared) > 1)} (ids {ids[0]} and {ids[1]})",
                "choose sources or splits without overlap",
            )


def _pixels(data: Dataset) -> list[bytes]:
    if isinstance(data.inputs, Tensor):
        return data.content()
    found = []
    for start in range(0, len(data), _BLOCK):
        block = data.inputs[torch.arange(start, min(start + _BLOCK, len(data)))]
        found += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in block]
    return found


def draw_references(pool: Dataset, target_class: int, size: int, seed: Seed) -> Tensor:
    """Draw reference inputs: `size` different rows of `pool` (int64) that show the target class.

    Raises:
        UsageError: there is no such class.
        DataError: the pool holds fewer images of it.
    """
    if not 0 <= target_class < pool.num_classes:
        raise UsageError(
            pool.name, f"has no class {target_class}", f"choose a target class in 0–{pool.num_classes - 1}"
        )
    rows = (pool.labels == target_class).nonzero().flatten()
    if len(rows) < size:
        raise DataError(
            pool.name, f"holds {len(rows)} images of class {target_class}, {size} are asked for", "ask for fewer"
        )
    return rows[torch.randperm(len(rows), generator=seed.child("references").torch())[:size]]


def hold_out(data: Dataset, per_class: int, seed: Seed) -> tuple[Dataset, Dataset]:
    """Split off `per_class` random images of each class, as (kept, held).

    Images that equal a held one leave `kept` too: real sets hold some pictures twice. Unlabelled images are kept.

    Raises:
        DataError: no labels, or a class that would lose its last image.
    """
    labels = data.labels
    present: Sequence[int] = torch.unique(labels[labels >= 0]).tolist()
    if not present:
        raise DataError(data.name, "has no labels", "give a labelled data set")
    held = torch.zeros(len(data), dtype=torch.bool)
    for label in present:
        rows = (labels == label).nonzero().flatten()
        if len(rows) <= per_class:
            what = f"has {len(rows)} images of class {label}; {per_class} are held out and some must stay"
            raise DataError(data.name, what, "give more images per class")
        held[rows[torch.randperm(len(rows), generator=seed.child("hold_out", label).torch())[:per_class]]] = True
    content = data.content()
    taken = {content[row] for row in held.nonzero().flatten().tolist()}
    kept = torch.tensor([one not in taken for one in content])
    return data.subset(kept), data.subset(held)
