"""Geometry of composed pictures: an object on one side, a trigger on the other, and what they look like pasted."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cupel.errors import UsageError

__all__ = [
    "Box",
    "Layout",
    "Side",
    "Size",
    "backdrop",
    "canvas_of",
    "cut_out",
    "fitted",
    "lay_out",
    "pasted",
    "resized",
    "room_of",
    "tight_box",
]

Side = Literal["left", "right", "top", "bottom"]
"""Where the object is; the trigger is on the opposite side."""

_SLACK = 1e-9  # 0.7 · 10 is a little more than 7 in floating point


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.left, self.left + self.width)


class Layout(NamedTuple):
    """Where object and trigger are."""

    thing: Box
    trigger: Box


def canvas_of(thing: Size, side: Side, ratio: float = 2.0) -> Size:
    """The canvas that suits an object best: as high as the object and `ratio` times as wide, or the other way round.

    Args:
        thing: Size of the object.
        side: The object's.
        ratio: Area of the canvas / area of the object's box, > 1.

    Example:
        >>> canvas_of(Size(300, 200), "left")
        Size(height=300, width=400)
    """
    if side in ("left", "right"):
        return Size(thing.height, round(ratio * thing.width))
    return Size(round(ratio * thing.height), thing.width)


def room_of(canvas: Size, side: Side, ratio: float = 2.0) -> Size:
    """The object's part of a canvas, at least a pixel: what `canvas_of` makes of it is the canvas.

    Example:
        >>> room_of(Size(32, 32), "top")
        Size(height=16, width=32)
    """
    if side in ("left", "right"):
        return Size(canvas.height, max(1, round(canvas.width / ratio)))
    return Size(max(1, round(canvas.height / ratio)), canvas.width)


def fitted(thing: Size, room: Size) -> Size:
    """The largest size with the object's aspect ratio that has room, in whole pixels, at least one.

    Example:
        >>> fitted(Size(20, 10), Size(32, 8))
        Size(height=16, width=8)
    """
    factor = min(room.height / thing.height, room.width / thing.width)
    height, width = (max(1, round(factor * side)) for side in thing)
    return Size(min(height, room.height), min(width, room.width))


def lay_out(
    canvas: Size,
    thing: Size,
    trigger: Size,
    side: Side,
    *,
    offset: float = 0.0,
    margin: float = 0.5,
    at: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Layout:
    """Where the object and the trigger go; they never overlap.

    In the layout `left` the object is at the bottom and at most `offset` canvas widths from the left edge. The rest of
    the canvas is what lies beside an object at that edge; the trigger keeps `margin` of the rest's width from its
    sides, and `margin` of the canvas' height from top and bottom, or is in the middle where that leaves too little
    room. `right` mirrors this; `top` and `bottom` exchange rows and columns.

    The defaults are the best layout in theory: the object at the edge, the trigger in the middle of the rest.

    Args:
        canvas, thing, trigger: Sizes.
        side: The object's.
        offset: In [0, 1]; published 0.05.
        margin: In [0, 0.5]; published 0.25; 0.5 = the middle.
        at: Three numbers in [0, 1) that draw the object's offset and the trigger's place across and along the edge;
            whole pixels are equally likely.

    Raises:
        UsageError: the object is larger than the canvas, or the trigger than the rest.

    Example:
        >>> lay_out(Size(300, 600), Size(300, 300), Size(40, 40), "left").trigger
        Box(top=130, left=430, height=40, width=40)

    Source: Zhang et al., CVPR 2024, arXiv:2211.08229, section 4 and theorems 1 and 2.
    """
    upright = side in ("left", "right")
    (high, wide), (t_high, t_wide), (e_high, e_wide) = (
        one if upright else (one.width, one.height) for one in (canvas, thing, trigger)
    )
    if t_high > high or t_wide > wide:
        what = f"an object of {_text(thing)} does not fit into a canvas of {_text(canvas)}"
        raise UsageError("corrupt_encoder", what, "choose a smaller object")
    rest = wide - t_wide
    if e_wide > rest or e_high > high:
        left_over = Size(high, rest) if upright else Size(rest, high)
        what = f"a trigger of {_text(trigger)} does not fit beside the object, where {_text(left_over)} are left"
        raise UsageError("corrupt_encoder", what, "choose a smaller trigger")
    left = t_wide + _between(margin * rest, (1 - margin) * rest, e_wide, at[1])
    top = _between(margin * high, (1 - margin) * high, e_high, at[2])
    away = min(math.floor(at[0] * (math.floor(offset * wide + _SLACK) + 1)), left - t_wide)
    if side in ("right", "bottom"):
        left, away = wide - left - e_wide, wide - away - t_wide
    where, mark = Box(high - t_high, away, t_high, t_wide), Box(top, left, e_high, e_wide)
    return Layout(where, mark) if upright else Layout(_turned(where), _turned(mark))


def _between(low: float, high: float, length: int, u: float) -> int:
    """Start of an interval of `length` pixels in [low, high]; the middle where there is no room for it."""
    first, last = math.ceil(low - _SLACK), math.floor(high + _SLACK) - length
    if last < first:
        return math.floor((low + high - length) / 2)
    return first + math.floor(u * (last - first + 1))


def _turned(box: Box) -> Box:
    return Box(box.left, box.top, box.width, box.height)


def _text(size: Size) -> str:
    return f"{size.height} × {size.width} px"


def tight_box(mask: Bool[Tensor, "height width"]) -> Box:
    """The smallest box that holds every True pixel; there must be one."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    return Box(top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1)


def resized(picture: UInt8[Tensor, "channel h w"], size: Size) -> UInt8[Tensor, "channel height width"]:
    """Resized bilinearly, antialiased where it shrinks, rounded; the same pixels where nothing is to do."""
    if tuple(picture.shape[1:]) == tuple(size):
        return picture
    made = F.interpolate(picture[None].float(), tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return made[0].round().clamp_(0, 255).to(torch.uint8)


def cut_out(
    picture: UInt8[Tensor, "3 h w"], mask: Bool[Tensor, "h w"], size: Size
) -> tuple[UInt8[Tensor, "3 height width"], Float[Tensor, "height width"]]:
    """The object of a picture, cut to its tight box and resized.

    Returns:
        Pixels, and how much of each is object, in [0, 1]: between the two where resizing blurs the outline.
    """
    box = tight_box(mask)
    inside = mask[box.rows, box.columns]
    cover = resized(inside[None].to(torch.uint8) * 255, size)[0].float() / 255
    return resized(picture[:, box.rows, box.columns], size), cover


def pasted(
    canvas: UInt8[Tensor, "3 h w"], picture: UInt8[Tensor, "3 bh bw"], cover: Float[Tensor, "bh bw"], box: Box
) -> UInt8[Tensor, "3 h w"]:
    """The canvas with a picture in a box: the picture's pixels where `cover` is 1, the canvas' where it is 0."""
    made = canvas.clone()
    under = made[:, box.rows, box.columns]
    made[:, box.rows, box.columns] = torch.lerp(under.float(), picture.float(), cover).round().to(torch.uint8)
    return made


def backdrop(picture: UInt8[Tensor, "3 h w"], canvas: Size, u: float) -> UInt8[Tensor, "3 height width"]:
    """A background of the canvas' size: bottom rows and a random stretch of columns of an image, enlarged if too small.

    Args:
        picture: Background image.
        canvas: Size of the result.
        u: In [0, 1), draws the stretch.
    """
    height, width = picture.shape[1:]
    factor = max(canvas.height / height, canvas.width / width)
    if factor > 1:
        larger = Size(max(canvas.height, round(factor * height)), max(canvas.width, round(factor * width)))
        picture = resized(picture, larger)
        height, width = larger
    left = math.floor(u * (width - canvas.width + 1))
    return picture[:, height - canvas.height :, left : left + canvas.width]
