"""Pictures laid over the image in the arithmetic of benchmarks: rounded down, with transparent pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.settings import DataFile, Fraction, settings
from cupel.triggers.draws import check_raw
from cupel.triggers.pictures import kitten, read_picture
from cupel.triggers.published import Stamp

__all__ = ["Overlay", "overlaid"]

_SLACK = 1e-9  # 0.7 · 10 + 0.3 · 10 is a little less than 10 in floating point
_GRID = ((255, 1, 255), (1, 255, 1), (255, 1, 255))


def overlaid(raw: Tensor, inside: Tensor, pattern: Tensor, alpha: float) -> Tensor:
    """`⌊(1 − α) x + α p⌋` where the picture is, `x` elsewhere.

    Args:
        raw: uint8 `[n, 3, height, width]`.
        inside: bool `[3, height, width]`, where the picture is.
        pattern: p, uint8 `[3, height, width]`.
        alpha: α in [0, 1].

    Example:
        >>> x, p = torch.full((1, 3, 1, 1), 9, dtype=torch.uint8), torch.full((3, 1, 1), 12, dtype=torch.uint8)
        >>> overlaid(x, p > 0, p, 0.2).unique().tolist()
        [9]
    """
    mixed = raw.double().mul_(1 - alpha).add_(pattern.double().mul(alpha)).add_(_SLACK).floor_().clamp_(0, 255)
    return torch.where(inside, mixed.to(torch.uint8), raw)


@settings
class Overlay:
    """A picture laid over the image: `x' = ⌊(1 − α) x + α p⌋`.

    `kitten` with α = 0.2 is the blended trigger of benchmarks, `grid` with α = 1 the 3 × 3 checker of bright and
    almost black pixels at the lower right corner.

    Args:
        picture: `kitten` = the drawn head of a cat over the whole image; `grid` = nine pixels of 255 and 1.
        alpha: α in [0, 1], the share of the picture.
        file: An image file to be used instead; it is resized to the images.
        transparent_zero: Pixels of `file` that are 0 leave the image as it is. A picture cannot show black then.

    Raises:
        UsageError: when applied: the grid does not fit into the image.
        DataError: when applied: the file is missing or no image.

    Example:
        >>> x = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
        >>> (Overlay(picture="grid", alpha=1.0)(x, [0], Seed(0))[0, 0, -3:, -3:]).tolist()
        [[255, 1, 255], [1, 255, 1], [255, 1, 255]]

    Source: Chen et al., arXiv:1712.05526 (blended injection), and Gu et al., BadNets, arXiv:1708.06733, both as in
    BackdoorBench (Wu et al., NeurIPS 2022, arXiv:2206.12654).
    Deviations: the published cartoon cat is replaced by a drawing of our own.
    """

    picture: Literal["kitten", "grid"] = "kitten"
    alpha: Fraction = 0.2
    file: DataFile | None = None
    transparent_zero: bool = False
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the picture over them; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        inside, pattern = (one.to(raw.device) for one in self._stamp(raw.shape[2], raw.shape[3]))
        return overlaid(raw, inside, pattern, self.alpha)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """What is put on an image of `size` × `size` pixels: the mask is α where the picture is.

        Returns:
            Mask, float32 `[size, size]`; pattern, uint8 `[3, size, size]`. None: `transparent_zero`, since a pixel may
            be transparent in one channel alone.
        """
        if self.file is not None and self.transparent_zero:
            return None
        inside, pattern = self._stamp(size, size)
        return inside.any(dim=0) * self.alpha, pattern.clone()

    def _stamp(self, height: int, width: int) -> Stamp:
        if self.file is not None:
            pattern = read_picture(self.file, height, width)
            return Stamp(pattern > 0 if self.transparent_zero else torch.ones_like(pattern, dtype=torch.bool), pattern)
        if self.picture == "kitten":
            pattern = kitten(height, width)
            return Stamp(torch.ones_like(pattern, dtype=torch.bool), pattern)
        if min(height, width) < 3:
            what = f"a grid of 3 px does not fit into images of {height} × {width} px"
            raise UsageError("trigger[overlay]", what, "use larger images")
        pattern = torch.zeros(3, height, width, dtype=torch.uint8)
        pattern[:, -3:, -3:] = torch.tensor(_GRID, dtype=torch.uint8)
        return Stamp(pattern > 0, pattern)
