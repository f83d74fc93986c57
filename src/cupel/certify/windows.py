"""Which cells of an evidence map a patch can touch, and the windows that are masked against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from cupel.errors import SettingsError

__all__ = ["Windows", "bands", "receptive_field", "squares", "window_size"]


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Side of what one cell sees, in pixels, and pixels from cell to cell, behind convolutions in turn.

    Example:
        >>> receptive_field((3, 3, 1), (1, 2, 1))
        (5, 2)
    """
    side, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        side += (kernel - 1) * step
        step *= stride
    return side, step


def window_size(patch: int, field: int, stride: int) -> int:
    """Most cells along one axis that a patch can touch: ⌈(p + r − 1) / s⌉.

    Args:
        patch: p, side of the patch in pixels.
        field: r, side of what a cell sees.
        stride: s, pixels from cell to cell.

    Example:
        >>> [window_size(p, r, 8) for p, r in ((30, 17), (32, 17), (32, 33), (32, 9))]
        [6, 6, 8, 5]

    Source: Xiang et al., PatchGuard, USENIX Security 2021, arXiv:2005.10884, section 3.
    """
    return -(-(patch + field - 1) // stride)


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of one size in a map of cells.

    Args:
        covers: Window m holds cell c; bool `[windows, cells]`, cells row by row.
        shape: Of the map.
        size: Cells along one axis.
    """

    covers: Bool[Tensor, "windows cells"]
    shape: tuple[int, ...]
    size: int


def squares(height: int, width: int, size: int) -> Windows:
    """Square windows inside of a map, one at each place.

    Args:
        height, width: Of the map, in cells.
        size: Cells along one axis; below both.

    Raises:
        SettingsError: a window covers a whole side, so that masking leaves nothing to decide by.

    Example:
        >>> squares(2, 3, 1).covers.shape
        torch.Size([6, 6])
    """
    if size >= height or size >= width:
        what = f"a window of {size}×{size} cells leaves nothing of a map of {height}×{width}"
        raise SettingsError("window", what, "make the patch or what a cell sees smaller")
    rows, columns = _runs(height, size, height - size + 1), _runs(width, size, width - size + 1)
    covers = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return Windows(covers, (height, width), size)


def bands(count: int, size: int) -> Windows:
    """Runs of neighbours in a ring of bands, one from each band on.

    Args:
        count: Bands.
        size: Of a run, below `count`.

    Raises:
        SettingsError: a run covers the whole ring.
    """
    if size >= count:
        what = f"{size} of {count} bands can be touched, which leaves nothing to decide by"
        raise SettingsError("window", what, "make the patch or the bands smaller")
    return Windows(_runs(count, size, count), (count,), size)


def _runs(length: int, size: int, starts: int) -> Bool[Tensor, "starts length"]:
    """Runs of `size` from each of the first places on, around the end."""
    place, start = torch.arange(length), torch.arange(starts)[:, None]
    return (place - start) % length < size
