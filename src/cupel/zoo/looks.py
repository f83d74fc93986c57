"""What a trigger looks like, whatever its settings are called, and how it lies on an inverted one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel.protocols import Trigger
from cupel.seeds import Seed

__all__ = ["Look", "Overlap", "look_of", "overlap"]

_GREYS = (0, 128, 255)


@dataclass(frozen=True, eq=False)
class Look:
    """A trigger on black, grey and white.

    Args:
        digest: Of the pixels that it changes, cut out; the same wherever a stamp sits.
        mask: bool `[size, size]`, True where it changes a pixel.
        area: Share of the image that it changes.
        fixed: Whether it is the same on every image, and not at a place of its own.
    """

    digest: str
    mask: np.ndarray[Any, np.dtype[np.bool_]]
    area: float
    fixed: bool


def look_of(trigger: Trigger[Tensor], size: int) -> Look:
    """How a trigger looks on images of `size` × `size` pixels.

    Two triggers with the same pixels have the same digest, at other places and under other settings, too: a white
    square is a square of 255, 255, 255.

    Raises:
        UsageError: it does not fit into the image.

    Example:
        >>> from cupel.triggers import Patch
        >>> a, b = Patch(size=4), Patch(size=4, color=(255, 255, 255), corner="top_left")
        >>> look_of(a, 16).digest == look_of(b, 16).digest, look_of(a, 16).area
        (True, 0.0625)
    """
    plain = torch.tensor(_GREYS, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    shown, others = (
        torch.cat([trigger(plain[i : i + 1], [image], Seed(0)) for i in range(len(plain))]) for image in (0, 1)
    )
    fixed = bool((shown == others).all())
    changed = (shown != plain).any(dim=1).any(dim=0)
    rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
    if len(rows):
        shown = shown[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].contiguous()
    text = repr(tuple(shown.shape)).encode() + shown.numpy().tobytes()
    return Look(hashlib.sha256(text).hexdigest()[:32], changed.numpy(), float(changed.float().mean()), fixed)


@dataclass(frozen=True)
class Overlap:
    """How an inverted trigger lies on the true one.

    Args:
        iou: Intersection over union of their pixels.
        distance: Between their centres, in widths of the image.
    """

    iou: float
    distance: float


def overlap(inverted: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> Overlap | None:
    """Compare an inverted mask with the pixels that the true trigger covers.

    Args:
        inverted: `[height, width]` in [0, 1]; above a half counts as covered.
        true: bool `[height, width]`.

    Returns:
        None where either covers nothing.

    Example:
        >>> a, b = np.zeros((4, 4)), np.zeros((4, 4), dtype=bool)
        >>> a[0, :2], b[0, 1:3] = 1, True
        >>> overlap(a, b)
        Overlap(iou=0.3333333333333333, distance=0.25)
    """
    covered, wanted = np.asarray(inverted) > 0.5, np.asarray(true, dtype=bool)
    if not covered.any() or not wanted.any():
        return None
    centres = [np.argwhere(one).mean(axis=0) for one in (covered, wanted)]
    away = float(np.linalg.norm((centres[0] - centres[1]) / np.array(covered.shape)))
    return Overlap(float((covered & wanted).sum() / (covered | wanted).sum()), away)
