"""What a trigger that an attack learned, or one that covers much of the image, changes in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cupel.records import Record
from cupel.report.cells import Arrays
from cupel.report.pictures import as_bytes, data_uri, is_batch, is_picture, is_small

__all__ = ["FACTORS", "amplified", "changes_of", "zoomed"]

View = dict[str, Any]
FACTORS = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5)
"""Amplifications of a difference; the largest is taken with which nothing leaves the range of a pixel."""

_SHOWN = 3
_WIDE = 0.25  # of the pixels: a trigger that changes more is hard to see beside the image
_ZOOM, _LARGEST = 8, 512
_LEARNED = {"sticker": "png", "additive": "png", "learned_filter": "weights"}


def changes_of(record: Record, arrays: Arrays) -> View | None:
    """Image, triggered image and amplified difference of some images, and the pattern enlarged.

    Shown for learned triggers, as the manifest tells, and for those that change more than a quarter of the pixels; the
    smaller ones that the attacker drew are seen well enough in the pictures.

    Returns:
        None where there is nothing to show: no pictures, no change.
    """
    clean, hit = arrays.get("images/clean"), arrays.get("images/triggered")
    if not is_batch(clean) or not is_batch(hit) or hit.shape != clean.shape:
        return None
    clean, hit = clean[:_SHOWN], hit[:_SHOWN]
    difference = hit.astype(np.int16) - clean
    learned, largest = _is_learned(record), int(np.abs(difference).max())
    share = float((difference != 0).any(axis=-1).mean())
    if not largest or not (learned or share > _WIDE):
        return None
    factor = next(one for one in FACTORS if one * largest <= 127 or one == FACTORS[-1])
    rows = [
        {"clean": data_uri(a), "hit": data_uri(b), "change": data_uri(amplified(d, factor)), "pixels": is_small(a)}
        for a, b, d in zip(clean, hit, difference, strict=True)
    ]
    pattern = _enlarged(arrays) if learned else None
    return {"learned": learned, "rows": rows, "factor": f"{factor:g}", "largest": largest, "pattern": pattern}


def amplified(difference: NDArray[Any], factor: float) -> NDArray[np.uint8]:
    """`128 + factor · difference` as a picture: middle grey where nothing changed.

    Example:
        >>> amplified(np.array([[[-8, 0, 8]]]), 4.0).tolist()
        [[[96, 128, 160]]]
    """
    return np.clip(np.rint(128 + factor * difference), 0, 255).astype(np.uint8)


def zoomed(picture: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Every pixel of `[height, width, channel]` as a square of `factor` × `factor`."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _is_learned(record: Record) -> bool:
    """Whether a goal's trigger carries pixels or weights of its own."""
    manifest = record.extra.get("manifest")
    goals = manifest.get("goals") if isinstance(manifest, Mapping) else None
    triggers = [one.get("trigger") for one in goals or () if isinstance(one, Mapping)] if _listed(goals) else []
    return any(_carries(one) for one in triggers)


def _listed(value: object) -> bool:
    return isinstance(value, list | tuple)


def _carries(trigger: object) -> bool:
    if not isinstance(trigger, Mapping):
        return False
    method = trigger.get("method")
    return bool(trigger.get(_LEARNED[method])) if isinstance(method, str) and method in _LEARNED else False


def _enlarged(arrays: Arrays) -> View | None:
    """The part of the image that the pattern covers, pixel by pixel; None where it covers more than a quarter."""
    mask, pattern = arrays.get("trigger/mask"), arrays.get("trigger/pattern")
    if mask is None or mask.ndim != 2 or not is_picture(pattern) or pattern.shape != (*mask.shape, 3):
        return None
    shade = as_bytes(mask)
    ys, xs = np.nonzero(shade)
    if not len(ys) or len(ys) > _WIDE * shade.size:
        return None
    top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
    factor = max(1, min(_ZOOM, _LARGEST // max(bottom - top, right - left)))
    part = np.dstack([pattern, shade])[top:bottom, left:right]
    return {
        "uri": data_uri(zoomed(part, factor), most=_LARGEST),
        "size": f"{right - left} × {bottom - top}",
        "at": f"{left}, {top}",
        "zoom": factor,
    }
