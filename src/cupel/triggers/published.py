"""Trigger files as the BadEncoder authors publish them: `.npz` with a pattern `t` and a mask `tm`."""

from __future__ import annotations

import functools
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cupel.errors import DataError, UsageError
from cupel.lookup import find_file

__all__ = ["Stamp", "read_stamp"]

_LIMIT = 512 * 2**20  # bytes that a member may unpack to; the published file for 224 px has 1.2 MB


class Stamp(NamedTuple):
    """A fixed trigger of one image size: `x' = x` where `inside` is False, `pattern` where it is True.

    Args:
        inside: bool `[3, height, width]`.
        pattern: uint8 `[3, height, width]`, 0 outside.
    """

    inside: Tensor
    pattern: Tensor


def read_stamp(name: str, index: int) -> Stamp:
    """Read trigger number `index` of a published trigger file.

    The file holds `t` `[K, height, width, 3]` in 0–255, zero outside the patch, and `tm` of the same shape, 0 inside
    the patch and 1 elsewhere; an image becomes `x * tm[k] + t[k]`. Nothing in the file is unpickled.

    Raises:
        DataError: missing, truncated or no such file; the K axis is missing; `tm` is not 0/1 or is inverted
            (1 inside, as in one public file); `t` is outside 0–255.
        UsageError: the file has no trigger of this number.
    """
    path = find_file(name)
    state = path.stat()
    t, tm = _read(path, (state.st_mtime_ns, state.st_size))
    if not 0 <= index < len(t):
        raise UsageError(path, f"holds {len(t)} trigger(s), so there is no number {index}", "count `index` from 0")
    inside = torch.from_numpy(tm[index] == 0).permute(2, 0, 1).contiguous()
    pattern = torch.from_numpy(np.rint(t[index]).astype(np.uint8)).permute(2, 0, 1).contiguous()
    return Stamp(inside, pattern)


@functools.lru_cache(maxsize=8)
def _read(path: Path, state: tuple[int, int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    t, tm = _members(path)
    problem = _problem(t, tm)
    if problem:
        raise DataError(path, *problem)
    return t, tm


def _members(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    todo = "give a trigger file with the arrays `t` and `tm`"
    try:
        with zipfile.ZipFile(path) as archive:
            if max((member.file_size for member in archive.infolist()), default=0) > _LIMIT:
                raise DataError(path, "is too large for a trigger file", todo)
        with np.load(path, allow_pickle=False) as members:
            missing = [key for key in ("t", "tm") if key not in members.files]
            if missing:
                raise DataError(path, f"has no array '{missing[0]}'", todo)
            return members["t"], members["tm"]
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(path, f"is no readable .npz file ({type(error).__name__})", todo) from error


def _problem(t: np.ndarray[Any, Any], tm: np.ndarray[Any, Any]) -> tuple[str, str] | None:
    """What is wrong with the arrays, and what to do; None = nothing."""
    if t.dtype.kind not in "iufb" or tm.dtype.kind not in "iufb":
        return f"`t` and `tm` must hold numbers, got {t.dtype} and {tm.dtype}", ""
    if t.shape != tm.shape:
        return f"`t` and `tm` differ in shape: {t.shape} and {tm.shape}", ""
    if t.ndim == 3:
        return (
            f"the first axis, which counts the triggers, is missing in the shape {t.shape}",
            "store `t[None]`, `tm[None]`",
        )
    if t.ndim != 4 or t.shape[3] != 3 or 0 in t.shape:
        return f"arrays must be [triggers, height, width, 3], got {t.shape}", ""
    if not np.isin(tm, (0, 1)).all():
        return "`tm` must be 0 inside the patch and 1 elsewhere, but holds other values", ""
    if not (np.isfinite(t).all() and t.min() >= 0 and t.max() <= 255):
        return "`t` must lie in 0–255", ""
    inside = tm == 0
    if (t[~inside] != 0).any() or (not t.any() and inside.mean() > 0.5):
        return (
            "`t` is not zero where `tm` is 1: the mask is inverted",
            "store `1 - tm`: 0 inside the patch, 1 elsewhere",
        )
    if not inside.any(axis=(1, 2, 3)).all():
        return "`tm` is 1 everywhere, so a trigger would change nothing", ""
    return None
