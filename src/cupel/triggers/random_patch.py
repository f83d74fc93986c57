"""An opaque patch at a random place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.settings import DataFile, Fraction, PositiveInt, settings
from cupel.triggers.draws import check_raw, uniforms
from cupel.triggers.pictures import colour_cells, read_picture

__all__ = ["RandomPatch", "corners"]

_SLACK = 1e-9  # 0.7 · 10 is a little more than 7 in floating point


def corners(
    height: int, width: int, size: int, low: float, high: float, ids: Sequence[int], seed: Seed
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Top-left corner (row, column) of the patch on each image, whole pixels.

    Rows are uniform over the integers in `[low · height, high · height − size]`, columns likewise, both independent.

    Args:
        height, width: Of the images, in pixels.
        size: Side of the patch.
        low, high: The band that the whole patch lies in, as fractions of the image.
        ids, seed: What the place of one image depends on.

    Returns:
        int64 `[n, 2]`.

    Raises:
        UsageError: the band has no room for the patch. With a band of 0.25–0.75 this means an image of less than two
            patches in width; the patch is never shrunk.
    """
    places = np.array([_places(side, size, low, high, (height, width)) for side in (height, width)])
    first, count = places.T
    drawn: np.ndarray[Any, np.dtype[np.int64]] = first + (uniforms(seed, ids, 2) * count).astype(np.int64)
    return drawn


def _places(side: int, size: int, low: float, high: float, image: tuple[int, int]) -> tuple[int, int]:
    """First corner and number of corners along one side."""
    first = math.ceil(low * side - _SLACK)
    last = math.floor(high * side + _SLACK) - size
    if last < first:
        band = f"the band {low:g}–{high:g} of images of {image[0]} × {image[1]} px"
        what = f"a trigger of {size} px does not fit into {band}"
        raise UsageError("trigger[random_patch]", what, "choose a smaller `size`")
    return first, last - first + 1


@settings
class RandomPatch:
    """An opaque square picture, at a place of its own on each image.

    Args:
        size: Side of the patch w, in pixels: 8 for 32-pixel images, 50 for ImageNet.
        low, high: The patch lies within these fractions of width and height: 0.25–0.75 while poisoning,
            0.10–0.90 at test time.
        pattern_seed: Seed of the drawn picture (4 × 4 random colours, enlarged).
        file: An image file to be used instead; it is resized to the patch.

    Raises:
        UsageError: when applied: the band has no room for the patch.
        DataError: when applied: the file is missing or no image.

    Source: Saha et al., SSL-Backdoor, CVPR 2022, arXiv:2105.10123.
    Deviations: the published pictures are replaced by drawn ones of the same make; the place is drawn from (seed, id),
    where the reference code sets no seed.
    """

    size: PositiveInt = 8
    low: Fraction = 0.25
    high: Fraction = 0.75
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    file: DataFile | None = None
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the patch on them, each at its own place."""
        check_raw(raw, ids)
        places = corners(raw.shape[2], raw.shape[3], self.size, self.low, self.high, ids, seed)
        top, left = torch.from_numpy(places).to(raw.device).unbind(dim=1)
        along = torch.arange(self.size, device=raw.device)
        image = torch.arange(len(raw), device=raw.device).view(-1, 1, 1, 1)
        channel = torch.arange(3, device=raw.device).view(1, 3, 1, 1)
        rows, columns = (top[:, None] + along)[:, None, :, None], (left[:, None] + along)[:, None, None, :]
        out = raw.clone()
        out[image, channel, rows, columns] = self.picture().to(raw.device)
        return out

    def picture(self) -> Tensor:
        """The patch, uint8 `[3, size, size]`; not to be written to."""
        if self.file is not None:
            return read_picture(self.file, self.size, self.size)
        return colour_cells(self.pattern_seed, self.size)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """None: the place differs from image to image."""
        return None
