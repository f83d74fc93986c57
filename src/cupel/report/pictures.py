"""Small pictures as `data:` addresses, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
from typing import Any, TypeGuard

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

__all__ = ["as_bytes", "data_uri", "is_batch", "is_picture", "is_small", "stamp_uri"]

_MOST_SIDE = 2048
_SHOWN_SIDE = 128
"""Larger pictures are shrunk to this side: a page of photographs stays below 3 MB."""


def is_picture(a: NDArray[Any] | None) -> TypeGuard[NDArray[np.uint8]]:
    """uint8 `[height, width, 3]` of a sensible size."""
    return a is not None and _fits(a.shape, a.dtype)


def is_batch(a: NDArray[Any] | None) -> TypeGuard[NDArray[np.uint8]]:
    """uint8 `[n, height, width, 3]` with n ≥ 1."""
    return a is not None and len(a.shape) == 4 and a.shape[0] > 0 and _fits(a.shape[1:], a.dtype)


def _fits(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    return dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and all(1 <= n <= _MOST_SIDE for n in shape)


def is_small(a: NDArray[Any]) -> bool:
    """So few pixels that they are shown as squares rather than blurred."""
    return bool(max(a.shape[:2]) < 96)


def data_uri(a: NDArray[Any], most: int = _SHOWN_SIDE) -> Markup:
    """A PNG of uint8 `[height, width(, 3 or 4)]` as an address for `src`; shrunk where a side is longer than `most`."""
    picture = Image.fromarray(np.ascontiguousarray(a))
    picture.thumbnail((most, most), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii"))


def stamp_uri(mask: NDArray[Any], pattern: NDArray[Any]) -> Markup | None:
    """A trigger on a see-through ground: the pattern, as opaque as its mask.

    Args:
        mask: `[height, width]` in [0, 1].
        pattern: uint8 `[height, width, 3]`, or float `[3, height, width]` in [0, 1].

    Returns:
        None where the shapes do not fit each other.
    """
    if pattern.ndim == 3 and pattern.dtype != np.uint8 and pattern.shape[0] == 3:
        pattern = as_bytes(pattern.transpose(1, 2, 0))
    if mask.ndim != 2 or not is_picture(pattern) or pattern.shape != (*mask.shape, 3):
        return None
    return data_uri(np.dstack([pattern, as_bytes(mask)]))


def as_bytes(share: NDArray[Any]) -> NDArray[np.uint8]:
    """Shares in [0, 1] as grey levels; what is no number is 0."""
    return np.asarray(np.rint(255 * np.clip(np.nan_to_num(share.astype(np.float64)), 0, 1)), dtype=np.uint8)
