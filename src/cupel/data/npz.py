"""Images in NumPy's `.npz`: `x` uint8 `[n, height, width, 3]` and `y` int `[n]`; also `images` and `labels`."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cupel.data.decode import Pixels8
from cupel.data.stored import Arrays, Listing, unlabelled
from cupel.errors import DataError

__all__ = ["read_arrays", "read_npz"]

_LIMIT = 16 * 2**30  # bytes that the file may unpack to
_ADVICE = "store `x` uint8 [n, height, width, 3] and, if there are labels, `y` int [n]"

Array = np.ndarray[Any, Any]


def read_npz(path: Path, name: str) -> Listing:
    """Read images and labels; greyscale gets three channels.

    Raises:
        DataError: no `.npz`, no images in it, or arrays of another type or shape.
    """
    x, y = read_arrays(path)
    labels = unlabelled(len(x)) if y is None else torch.from_numpy(y.astype(np.int64))
    return Listing(Arrays(x, str(path)), labels, name)


def read_arrays(path: Path) -> tuple[Pixels8, Array | None]:
    """`x` as uint8 `[n, height, width, 3]` and `y` as integers `[n]`, or None. Nothing is unpickled.

    Raises:
        DataError: as `read_npz`.
    """
    x, y = _members(path)
    if x.dtype != np.uint8:
        raise DataError(path, f"images must be uint8, got {x.dtype}", _ADVICE)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        raise DataError(path, f"images have the channel first: {list(x.shape)}", "store x.transpose(0, 2, 3, 1)")
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape[1:]:
        raise DataError(path, f"images must be [n, height, width, 3], got {list(x.shape)}", _ADVICE)
    if y is not None and (y.dtype.kind not in "iu" or y.shape != (len(x),)):
        raise DataError(path, f"labels must be {len(x)} integers, got {y.dtype} {list(y.shape)}", _ADVICE)
    return (np.repeat(x, 3, axis=3) if x.shape[3] == 1 else x), y


def _members(path: Path) -> tuple[Array, Array | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > _LIMIT:
                raise DataError(path, "unpacks to more than 16 GiB", "split it, or store a folder of images")
        with np.load(path, allow_pickle=False) as held:
            x = next((key for key in ("x", "images") if key in held.files), None)
            y = next((key for key in ("y", "labels") if key in held.files), None)
            if x is None:
                raise DataError(path, f"has no array `x` (it has: {', '.join(held.files) or 'nothing'})", _ADVICE)
            return held[x], None if y is None else held[y]
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(path, f"is no readable .npz file ({type(error).__name__})", _ADVICE) from error
