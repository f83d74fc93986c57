"""The smallest trigger that a scan found, pixel by pixel: alone, and on an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cupel.report.cells import Arrays
from cupel.report.pictures import as_bytes, data_uri, is_batch, stamp_uri

__all__ = ["ZOOM", "applied", "closeup", "window"]

View = dict[str, Any]
ZOOM = 8
_SIDE = 64
"""Of larger images, so many pixels across are enlarged: those around the trigger."""


def closeup(mask: NDArray[Any], pattern: NDArray[Any], arrays: Arrays) -> View | None:
    """The trigger `ZOOM` times as large, and an image without and with it; of a large image a part and the whole.

    Args:
        mask: `[height, width]` in [0, 1].
        pattern: float `[3, height, width]` in [0, 1].
        arrays: The image is the first of `images/scanned`, else of `images/clean`; there may be none.

    Returns:
        Pictures as they are; the page enlarges them. None where mask and pattern do not fit each other.
    """
    if mask.ndim != 2 or pattern.shape != (3, *mask.shape) or pattern.dtype == np.uint8:
        return None
    top, left, height, width = window(mask)
    rows, columns = slice(top, top + height), slice(left, left + width)
    trigger = stamp_uri(mask[rows, columns], pattern[:, rows, columns])
    if trigger is None:
        return None
    part = "" if (height, width) == mask.shape else f"{width} × {height} px at ({left}, {top})"
    made: View = {
        "trigger": trigger, "width": ZOOM * width, "height": ZOOM * height, "zoom": ZOOM, "part": part,
        "clean": None, "hit": None, "whole": None,
    }  # fmt: skip
    image = _image(arrays, mask.shape)
    if image is not None:
        hit = applied(image, mask, pattern)
        made["hit"] = data_uri(hit[rows, columns])
        made["whole" if part else "clean"] = data_uri(hit if part else image)
    return made


def _image(arrays: Arrays, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    for key in ("images/scanned", "images/clean"):
        images = arrays.get(key)
        if is_batch(images) and images.shape[1:3] == shape:
            first: NDArray[np.uint8] = images[0]
            return first
    return None


def applied(image: NDArray[np.uint8], mask: NDArray[Any], pattern: NDArray[Any]) -> NDArray[np.uint8]:
    """`(1 − m) x + m p` as a picture.

    Args:
        image: uint8 `[height, width, 3]`.
        mask: `[height, width]` in [0, 1].
        pattern: `[3, height, width]` in [0, 1].

    Example:
        >>> one = np.ones((1, 1))
        >>> applied(np.uint8([[[200, 0, 0]]]), one / 2, np.stack([0 * one, one, one])).tolist()
        [[[100, 128, 128]]]
    """
    m = np.clip(np.nan_to_num(mask.astype(np.float64)), 0, 1)[..., None]
    p = np.nan_to_num(pattern.astype(np.float64)).transpose(1, 2, 0)
    return as_bytes((1 - m) * image / 255 + m * p)


def window(mask: NDArray[Any], side: int = _SIDE) -> tuple[int, int, int, int]:
    """Top, left, height and width of the part, at most `side` pixels across, that holds most of the mask.

    Example:
        >>> mask = np.zeros((10, 10)); mask[7, 2] = 1
        >>> window(mask, side=4)
        (5, 1, 4, 4)
    """
    weight = np.clip(np.nan_to_num(mask.astype(np.float64)), 0, 1)
    height, width = (min(side, n) for n in mask.shape)
    sums = np.pad(weight.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    held = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    best = np.argwhere(held >= held.max() - 1e-9)
    top, left = best[np.square(best - best.mean(axis=0)).sum(axis=1).argmin()]  # of equal ones that in the middle
    return int(top), int(left), height, width
