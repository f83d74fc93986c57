"""Pictures that triggers show: drawn from a seed, or read from an image file."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cupel.errors import DataError
from cupel.lookup import find_file
from cupel.seeds import Seed

__all__ = ["apple", "colour_cells", "colour_waves", "kitten", "read_picture"]

Grid = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


@functools.lru_cache(maxsize=64)
def colour_cells(seed: int, size: int, cells: int = 4) -> Tensor:
    """A square of `cells` × `cells` random colours, enlarged bilinearly.

    Args:
        seed: Another seed, another picture.
        size: Pixels per side.
        cells: Colours per side.

    Returns:
        uint8 `[3, size, size]`; shared between callers, so not to be written to.

    Source: the triggers of Saha et al., Hidden Trigger Backdoor Attacks, AAAI 2020, are made in this way.
    """
    colours = torch.rand(1, 3, cells, cells, generator=Seed(seed).child("colour_cells").torch()) * 255
    return F.interpolate(colours, (size, size), mode="bilinear", align_corners=False)[0].round().to(torch.uint8)


@functools.lru_cache(maxsize=64)
def colour_waves(seed: int, height: int, width: int, waves: int = 6) -> Tensor:
    """Smooth coloured noise: per channel a sum of plane waves with at most four periods across the picture.

    The picture is a function of the relative position, so it looks the same at every size. Each channel fills 0–255.

    Args:
        seed: Another seed, another picture.
        height, width: Pixels.
        waves: Waves per channel.

    Returns:
        uint8 `[3, height, width]`; shared between callers, so not to be written to.
    """
    rng = Seed(seed).child("colour_waves").numpy()
    frequency = rng.uniform(-4, 4, size=(3, waves, 2))
    phase = rng.uniform(0, 2 * math.pi, size=(3, waves, 1, 1))
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / width)[None, :]
    angle = 2 * math.pi * (frequency[..., 0, None, None] * y + frequency[..., 1, None, None] * x) + phase
    sums = np.cos(angle).sum(axis=1)
    low, high = sums.min(axis=(1, 2), keepdims=True), sums.max(axis=(1, 2), keepdims=True)
    filled = (sums - low) / np.maximum(high - low, 1e-9)
    return torch.from_numpy(np.rint(filled * 255).astype(np.uint8))


@functools.lru_cache(maxsize=16)
def apple(height: int, width: int) -> Tensor:
    """The silhouette of an apple with a leaf in the lower right of the picture, our own drawing.

    It lies in rows 54–91 % and columns 57–87 %; every pixel that it touches belongs to it.

    Returns:
        bool `[height, width]`; shared between callers, so not to be written to.
    """
    y, x = _grid(8 * height, 8 * width)
    body = _ellipse(x, y, 0.68, 0.76, 0.105, 0.15) | _ellipse(x, y, 0.765, 0.76, 0.105, 0.15)
    leaf = _ellipse(x, y, 0.75, 0.58, 0.05, 0.045)
    return torch.from_numpy((body | leaf).reshape(height, 8, width, 8).any(axis=(1, 3)))


@functools.lru_cache(maxsize=16)
def kitten(height: int, width: int) -> Tensor:
    """The head of a white cat with a red bow on a pink ground, our own drawing.

    The picture is a function of the relative position, so it looks the same at every size.

    Returns:
        uint8 `[3, height, width]`; shared between callers, so not to be written to.
    """
    y, x = _grid(height, width)
    ears = (np.abs(np.abs(x - 0.5) - 0.27) < (y - 0.08) * 0.45) & (y < 0.45)
    head = _ellipse(x, y, 0.5, 0.56, 0.42, 0.34) | ears
    eyes = _ellipse(x, y, 0.3, 0.58, 0.04, 0.065) | _ellipse(x, y, 0.7, 0.58, 0.04, 0.065)
    nose = _ellipse(x, y, 0.5, 0.68, 0.05, 0.03)
    slope = y - 0.1 * np.abs(x - 0.5)
    whiskers = ((np.abs(slope - 0.58) < 0.015) | (np.abs(slope - 0.66) < 0.015)) & (np.abs(x - 0.5) > 0.34)
    bow = _ellipse(x, y, 0.66, 0.22, 0.09, 0.08) | _ellipse(x, y, 0.86, 0.22, 0.09, 0.08)
    picture = np.empty((height, width, 3), dtype=np.uint8)
    picture[:] = (247, 150, 190)
    for shape, colour in (
        (head, (250, 250, 250)), (whiskers, (60, 40, 40)), (eyes, (20, 20, 20)), (nose, (250, 200, 20)),
        (bow, (215, 20, 50)), (_ellipse(x, y, 0.76, 0.22, 0.045, 0.05), (255, 90, 90)),
    ):  # fmt: skip
        picture[shape] = colour
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def _grid(height: int, width: int) -> tuple[Grid, Grid]:
    """Relative position of each pixel's centre: down `[height, 1]` and across `[1, width]`."""
    return ((np.arange(height) + 0.5) / height)[:, None], ((np.arange(width) + 0.5) / width)[None, :]


def _ellipse(x: Grid, y: Grid, cx: float, cy: float, rx: float, ry: float) -> Mask:
    inside: Mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
    return inside


def read_picture(name: str, height: int, width: int) -> Tensor:
    """An image file as RGB, resized bilinearly (with antialiasing) to `height` × `width`.

    Returns:
        uint8 `[3, height, width]`; shared between callers, so not to be written to.

    Raises:
        DataError: the file is missing or is no readable image.
    """
    path = find_file(name)
    state = path.stat()
    return _read(path, height, width, (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=16)
def _read(path: Path, height: int, width: int, state: tuple[int, int]) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(path, f"is no readable image ({type(error).__name__})", "give a PNG or JPEG file") from error
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
