"""Coloured shapes: a procedurally rendered data set of our own, with object masks; nothing to download.

The class is the shape. Colour, size, place, tilt, texture and background are drawn at random and say nothing about it,
so an encoder that looks at pixels alone does poorly and one that is trained well does well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.types import Dataset, Objects

__all__ = ["REVISION", "SHAPES", "render", "shape_backgrounds", "shape_objects"]

REVISION = 2
_TILT = np.pi / 12  # largest turn: plus and cross, 45° apart, stay apart
_CLUTTER = 2  # at most so many discs in the background
_CHUNK = 2**19  # pixels rendered at a time: the working set stays in the processor's cache

Array = np.ndarray[Any, np.dtype[np.float32]]
Counter = np.ndarray[Any, np.dtype[np.uint64]]


def _box(x: Array, y: Array, width: float, height: float) -> Array:
    a, b = np.abs(x) - np.float32(width), np.abs(y) - np.float32(height)
    outside = np.hypot(np.maximum(a, 0), np.maximum(b, 0))
    return np.asarray(outside + np.minimum(np.maximum(a, b), 0))


def _disk(x: Array, y: Array) -> Array:
    return np.asarray(np.hypot(x, y) - np.float32(0.85))


def _ring(x: Array, y: Array) -> Array:
    return np.asarray(np.abs(np.hypot(x, y) - np.float32(0.7)) - np.float32(0.2))


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.75, 0.75)


def _frame(x: Array, y: Array) -> Array:
    return np.maximum(_box(x, y, 0.8, 0.8), -_box(x, y, 0.42, 0.42))


def _triangle(x: Array, y: Array) -> Array:
    slant = np.float32(0.866) * np.abs(x) - np.float32(0.5) * y  # y points down: the tip is at the top
    return np.asarray(np.maximum(slant - np.float32(0.5), y - np.float32(0.62)))


def _plus(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.9, 0.26), _box(x, y, 0.26, 0.9))


def _cross(x: Array, y: Array) -> Array:
    half = np.float32(np.sqrt(0.5))
    return _plus(half * (x + y), half * (x - y))


def _bars(x: Array, y: Array) -> Array:
    return _box(x, np.abs(y) - np.float32(0.5), 0.85, 0.23)


def _star(x: Array, y: Array) -> Array:
    # folded into one tenth, where the edge is the line from an outer tip (radius 1) to an inner corner (0.42)
    tenth = np.float32(np.pi / 5)
    angle = np.abs(np.remainder(np.arctan2(x, -y) + tenth, 2 * tenth) - tenth)
    radius = np.hypot(x, y)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    inner = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    along = inner - np.array([1.0, 0.0])
    across = np.array([along[1], -along[0]]) / np.hypot(*along)
    return np.asarray((u - 1) * np.float32(across[0]) + v * np.float32(across[1]))


def _crescent(x: Array, y: Array) -> Array:
    bite = np.float32(0.72) - np.hypot(x - np.float32(0.42), y)
    return np.asarray(np.maximum(_disk(x, y), bite))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "plus": _plus,
    "cross": _cross,
    "bars": _bars,
    "star": _star,
    "crescent": _crescent,
}
"""Signed distance of each shape: negative inside, about the distance to the edge near it; `x`, `y` in about [−1, 1]."""


def render(n: int, size: int = 32, seed: Seed = Seed(0)) -> tuple[Dataset, Tensor]:
    """Render `n` images and the masks of their objects.

    Image `i` depends on (seed, i, size) alone, not on `n`, and its pose and colours not on `size`. Classes take
    turns: image `i` is of class `i` modulo the number of shapes.

    Args:
        n: Number of images, ≥ 1.
        size: Side in pixels, ≥ 8.
        seed: Everything random.

    Returns:
        The data set (uint8) and bool `[n, size, size]`, True on the object.

    Raises:
        UsageError: `n` or `size` is too small.

    Example:
        >>> data, masks = render(20, size=16)
        >>> data.inputs.shape, data.classes[int(data.labels[13])]
        (torch.Size([20, 3, 16, 16]), 'frame')
    """
    _check(n, size)
    images = np.empty((n, 3, size, size), dtype=np.uint8)
    masks = np.empty((n, size, size), dtype=np.bool_)
    step = max(1, _CHUNK // (size * size))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        images[rows], masks[rows] = _chunk(np.arange(rows.start, rows.stop), size, seed)
    ids = torch.arange(n)
    data = Dataset(torch.from_numpy(images), ids % len(SHAPES), ids, "shapes", tuple(SHAPES))
    return data, torch.from_numpy(masks)


_OWN = Seed(0).child("shapes", "own")  # shares no image with the splits that `cupel.data.load` gives


def shape_objects(labels: Sequence[int], n: int, size: int = 64, seed: Seed = _OWN) -> Objects:
    """Render `n` pictures of each of some shapes with their masks, none of which is in the data set `shapes`.

    Args:
        labels: Classes, positions in `SHAPES`.
        n: Pictures of each class, ≥ 1.
        size: Side in pixels, ≥ 8.
        seed: Everything random.

    Raises:
        UsageError: `n` or `size` is too small, or there is no such class.

    Example:
        >>> frames = shape_objects([3], 2, size=16)
        >>> frames.pictures.shape, frames.labels.tolist()
        (torch.Size([2, 3, 16, 16]), [3, 3])
    """
    for label in labels:
        if not 0 <= label < len(SHAPES):
            raise UsageError("shapes", f"there is no class {label}", f"choose one in 0–{len(SHAPES) - 1}")
    _check(n, size)
    wanted = np.repeat(np.array(labels, dtype=np.int64), n)
    images, masks = _chunk(wanted + len(SHAPES) * np.tile(np.arange(n), len(labels)), size, seed)
    return Objects(torch.from_numpy(images), torch.from_numpy(masks), torch.from_numpy(wanted))


def shape_backgrounds(n: int, size: int = 32, seed: Seed = _OWN) -> Dataset:
    """Render `n` backgrounds of `shapes` without an object, unlabelled.

    Args:
        n: Number of images, ≥ 1.
        size: Side in pixels, ≥ 8.
        seed: Everything random.

    Raises:
        UsageError: `n` or `size` is too small.

    Example:
        >>> shape_backgrounds(2, size=16).inputs.shape
        torch.Size([2, 3, 16, 16])
    """
    _check(n, size)
    step = max(1, _CHUNK // (size * size))
    parts = [_chunk(np.arange(i, min(i + step, n)), size, seed, bare=True)[0] for i in range(0, n, step)]
    ids = torch.arange(n)
    return Dataset(torch.from_numpy(np.concatenate(parts)), torch.full((n,), -1), ids, "shapes (backgrounds)")


def _check(n: int, size: int) -> None:
    if n < 1 or size < 8:
        raise UsageError("shapes", f"cannot render {n} images of {size} x {size} pixels", "n ≥ 1 and size ≥ 8")


def _chunk(ids: np.ndarray[Any, np.dtype[np.int64]], size: int, seed: Seed, bare: bool = False) -> tuple[Any, Any]:
    u = _Draws(ids, seed)
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - 1
    x, y = centres[None, None, :], centres[None, :, None]

    # object: place, size, tilt; it stays inside the image up to its outermost corners
    radius = u.between("size", 0.5, 0.85)
    free = 1 - np.float32(0.9) * radius
    dx, dy = x - free * u.between("x", -1, 1), y - free * u.between("y", -1, 1)
    tilt = u.between("tilt", -_TILT, _TILT)
    across, down = (np.cos(tilt) * dx + np.sin(tilt) * dy) / radius, (np.cos(tilt) * dy - np.sin(tilt) * dx) / radius
    distance = np.empty((len(ids), size, size), dtype=np.float32)
    for label, signed in enumerate(SHAPES.values()):
        mine = ids % len(SHAPES) == label
        distance[mine] = signed(across[mine], down[mine])
    covered = np.clip(0.5 - distance * radius * np.float32(size / 2), 0, 1)  # share of the pixel that is object
    if bare:
        covered = np.zeros_like(covered)

    # background: a colour, a gradient towards another, a few discs
    ground = u.colour("ground", 0.05, 0.95)
    slope_x, slope_y = u.colour("slope x", -0.15, 0.15), u.colour("slope y", -0.15, 0.15)
    image = ground + slope_x * x[:, None] + slope_y * y[:, None]
    present = u.between("clutter", 0, _CLUTTER + 1)
    for k in range(_CLUTTER):
        r = u.between(f"clutter {k} size", 0.06, 0.16)
        away = np.hypot(x - u.between(f"clutter {k} x", -1, 1), y - u.between(f"clutter {k} y", -1, 1)) - r
        disc = np.clip(0.5 - away * np.float32(size / 2), 0, 1) * (present > k + 1)
        image += disc[:, None] * (u.colour(f"clutter {k}", 0, 1) - image)

    # object's colour: away from the ground by at least 0.25 of the range in every channel, in either direction
    paint = (ground + u.colour("paint", 0.25, 0.75)) % 1
    texture = u.between("texture", 0, 3)  # below 1: plain; below 2: stripes; else noise
    turn, pitch = u.between("stripe turn", 0, np.pi), u.between("stripe pitch", 8, 16)
    stripes = np.sin(pitch * (np.cos(turn) * dx + np.sin(turn) * dy) + u.between("stripe phase", 0, 2 * np.pi))
    noise = u.noise(size)
    inside = np.where(texture < 1, 0, np.where(texture < 2, np.float32(0.12) * stripes, np.float32(0.15) * noise))
    image += covered[:, None] * (paint + inside[:, None] - image)

    image += (u.between("noise", 0, 0.06) * noise)[:, None]
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return pixels, covered >= 0.5


class _Draws:
    """Uniform numbers by (seed, image, name): hashed, not taken from a stream, so that no draw shifts another."""

    def __init__(self, ids: np.ndarray[Any, np.dtype[np.int64]], seed: Seed) -> None:
        self.seed, self.ids = seed, ids.astype(np.uint64)

    def _uniform(self, name: str) -> Array:
        """`[n]` in [0, 1)."""
        return _unit(_mixed(self.ids + np.uint64(self.seed.child("shapes", name).value)))

    def between(self, name: str, low: float, high: float) -> Array:
        """`[n, 1, 1]`, uniform."""
        return (np.float32(low) + np.float32(high - low) * self._uniform(name))[:, None, None]

    def colour(self, name: str, low: float, high: float) -> Array:
        """`[n, 3, 1, 1]`, uniform in each channel."""
        return np.stack([self.between(f"{name} {channel}", low, high) for channel in "rgb"], axis=1)

    def noise(self, size: int) -> Array:
        """`[n, size, size]` in [−1, 1)."""
        start = _mixed(self.ids + np.uint64(self.seed.child("shapes", "pixels").value))
        counter = np.add.outer(start, np.arange(size * size, dtype=np.uint64))
        return (2 * _unit(_mixed(counter)) - 1).reshape(-1, size, size)


def _mixed(counter: Counter) -> Counter:
    """SplitMix64's step: a bijection of 64-bit integers whose outputs look independent (Steele, Lea, Flood 2014)."""
    z = counter * np.uint64(0x9E3779B97F4A7C15)  # wraps around
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _unit(z: Counter) -> Array:
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
