"""From a listing to a data set: small images as one uint8 tensor, large ones decoded when they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cupel.data.decode import Pixels8, quiet_pillow
from cupel.data.stored import Listing, Stored
from cupel.errors import DataError
from cupel.progress import say, track
from cupel.threads import usable_cpus
from cupel.types import Dataset

__all__ = ["LazyImages", "OnBad", "balanced", "materialise"]

OnBad = Literal["error", "skip"]

_IN_MEMORY = 2**30  # bytes of decoded images that are kept as one tensor
_MAX_BAD = 0.05  # share of unreadable images that `skip` puts up with
_THREADED = 96 * 96  # pixels from which on decoding outweighs handing the work to a thread
_BLOCK = 512
_MOST_THREADS = 16  # beyond, handing out work costs more than it brings: that part has one thread at a time


@dataclass(frozen=True)
class LazyImages:
    """Images of a source that are decoded each time they are indexed; implements `Pixels`.

    Indexing decodes on as many threads as the process has cores (at most 16), each straight to its place in the result:
    beside it, memory holds one image per thread. `cupel.data.ahead.ahead` does so while a model works.

    Args:
        images: Rows of the source.
        rows: int64 `[n]`, which of them.
        sides: Height and width.
        resize: Resize to that height, which is then also the width; else images have it already.

    Raises:
        DataError: when indexing meets an image that cannot be read.
    """

    images: Stored
    rows: Tensor = field(repr=False)
    sides: tuple[int, int]
    resize: bool

    @property
    def shape(self) -> Sequence[int]:
        """`[n, 3, height, width]`."""
        return (len(self.rows), 3, *self.sides)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Tensor:
        """uint8 `[n, 3, height, width]` for a slice, a mask or indices; one image for an integer."""
        chosen = self.rows[rows]
        size = self.sides[0] if self.resize else None
        made = torch.empty((chosen.numel(), 3, *self.sides), dtype=torch.uint8)
        with quiet_pillow():
            for error in _fill(self.images, chosen.reshape(-1).tolist(), size, self.sides, made.numpy(), threads=True):
                if error is not None:
                    raise error
        return made if chosen.ndim else made[0]

    def content(self) -> list[bytes]:
        """One digest per image, of the encoded bytes: the same picture saved twice differently differs here."""
        return self._content

    @cached_property
    def _content(self) -> list[bytes]:
        return [hashlib.blake2b(self.images.stored(row), digest_size=16).digest() for row in self.rows.tolist()]


def materialise(listing: Listing, rows: Tensor, size: int | None, on_bad: OnBad = "error") -> Dataset:
    """Make a data set of the given rows.

    Up to 1 GiB of decoded images become one tensor. With `on_bad="skip"` every image is decoded once at this point,
    also those that are decoded again later.

    Args:
        listing: One split of a source.
        rows: int64 `[n]`; they become the ids.
        size: Side in pixels; None = as stored, if all are equal.
        on_bad: Stop at an unreadable image, or leave it out and say how many were left out.

    Raises:
        DataError: an unreadable image (or more than 5 % of them), or sizes differ and none was asked for.
    """
    with quiet_pillow():
        sides = (size, size) if size is not None else _native(listing, rows)
        if len(rows) * 3 * sides[0] * sides[1] <= _IN_MEMORY:
            inputs: Tensor | LazyImages
            inputs, bad = _all(listing, rows, size, sides, keep=True)
        else:
            if on_bad == "skip":
                _, bad = _all(listing, rows, size, sides, keep=False)
            else:
                bad = {}
                if size is None:
                    _same_sides(listing, rows, sides)
            inputs = LazyImages(listing.images, rows, sides, resize=size is not None)
    _judge(listing.name, bad, len(rows), on_bad)
    whole = Dataset(inputs, listing.labels[rows], rows, listing.name, listing.classes)
    if not bad:
        return whole
    good = torch.ones(len(rows), dtype=torch.bool)
    good[list(bad)] = False
    return whole.subset(good)


def _native(listing: Listing, rows: Tensor) -> tuple[int, int]:
    failed: DataError | None = None
    for row in rows.tolist():
        try:
            return listing.images.sides(row)
        except DataError as error:
            failed = failed or error
    raise failed or DataError(listing.name, "holds no images")


def _same_sides(listing: Listing, rows: Tensor, sides: tuple[int, int]) -> None:
    for row in rows.tolist():
        if (other := listing.images.sides(row)) != sides:
            raise _differ(listing.images.where(row), other, sides)


def _differ(where: str, other: Sequence[int], first: Sequence[int]) -> DataError:
    what = f"is {other[1]} x {other[0]} pixels, the first image {first[1]} x {first[0]}"
    return DataError(where, what, "give a size that all are resized to")


def _all(
    listing: Listing, rows: Tensor, size: int | None, sides: tuple[int, int], keep: bool
) -> tuple[Tensor, dict[int, DataError]]:
    """Decode everything: uint8 `[n, 3, height, width]` (empty unless `keep`), and the errors by place in `rows`."""
    made = torch.zeros((len(rows) if keep else 0, 3, *sides), dtype=torch.uint8)
    view, bad = made.numpy() if keep else None, dict[int, DataError]()
    threads = sides[0] * sides[1] >= _THREADED
    with _followed(listing.name, len(rows)) as advance:
        for k, error in enumerate(_fill(listing.images, rows.tolist(), size, sides, view, threads)):
            if error is not None:
                bad[k] = error
            if k % _BLOCK == 0:
                advance(k)
    return made, bad


@contextlib.contextmanager
def _followed(name: str, total: int) -> Iterator[Any]:
    if total < 20_000:  # over in a moment: not worth a line
        yield lambda done: None
        return
    with track(f"read {name}", total) as advance:
        yield advance


def _fill(
    images: Stored,
    rows: Sequence[int],
    size: int | None,
    sides: tuple[int, int],
    made: Pixels8 | None,
    threads: bool,
) -> Iterator[DataError | None]:
    """Decode each row into its place in `made` `[n, 3, height, width]`; yields in order why it could not be."""

    def one(k: int) -> DataError | None:
        try:
            image = images.decode(rows[k], size)
        except DataError as error:
            return error
        if image.shape[:2] != sides:
            return _differ(images.where(rows[k]), image.shape, sides)
        if made is not None:
            made[k] = image.transpose(2, 0, 1)
        return None

    if not threads or len(rows) < 2:
        yield from map(one, range(len(rows)))
        return
    with ThreadPoolExecutor(min(_MOST_THREADS, usable_cpus())) as pool:
        for start in range(0, len(rows), _BLOCK):  # in blocks: after an error, what was handed in is still decoded
            yield from pool.map(one, range(start, min(start + _BLOCK, len(rows))))


def _judge(name: str, bad: dict[int, DataError], total: int, on_bad: OnBad) -> None:
    if not bad:
        return
    first = next(iter(bad.values()))
    if on_bad == "error":
        raise first
    if len(bad) > _MAX_BAD * total:
        raise DataError(name, f"{len(bad)} of {total} images cannot be read (first: {first})", "repair or remove them")
    say(f"  {name}: {len(bad)} of {total} images skipped (first: {first})")


def balanced(labels: Tensor, limit: int | None, order: np.random.Generator) -> Tensor:
    """At most `limit` random rows, ascending, as equal in number per class as the classes allow.

    Example:
        >>> rows = balanced(torch.tensor([0, 0, 0, 0, 1, 1]), 4, np.random.default_rng(0))
        >>> torch.tensor([0, 0, 0, 0, 1, 1])[rows].tolist()
        [0, 0, 1, 1]
    """
    n = len(labels)
    if limit is None or limit >= n:
        return torch.arange(n)
    shuffled = torch.from_numpy(order.permutation(n))
    if int(labels.max()) < 0:
        return shuffled[:limit].sort().values
    # the k-th image of its class in random order has rank k; all of rank 0 come first, then all of rank 1, …
    mine = labels[shuffled]
    grouped = mine.argsort(stable=True)
    counts = torch.unique_consecutive(mine[grouped], return_counts=True)[1]
    rank = torch.empty(n, dtype=torch.int64)
    rank[grouped] = torch.cat([torch.arange(int(count)) for count in counts])
    return shuffled[rank.argsort(stable=True)[:limit]].sort().values
