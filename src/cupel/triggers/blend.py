"""A faint picture over the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cupel.seeds import Seed
from cupel.settings import DataFile, Fraction, settings
from cupel.triggers.draws import check_raw
from cupel.triggers.pictures import colour_waves, read_picture

__all__ = ["Blend", "blended"]


def blended(raw: Tensor, pattern: Tensor, alpha: float) -> Tensor:
    """`(1 − α) x + α p`, computed in float64 and rounded to the nearest integer, halves to the even one.

    Args:
        raw: uint8 `[n, 3, height, width]`.
        pattern: uint8 `[3, height, width]`.
        alpha: α in [0, 1].

    Example:
        >>> x, p = torch.full((1, 3, 1, 1), 100, dtype=torch.uint8), torch.full((3, 1, 1), 200, dtype=torch.uint8)
        >>> blended(x, p, 0.2).unique().tolist()
        [120]
    """
    mixed = raw.double().mul_(1 - alpha).add_(pattern.double().mul(alpha))
    return mixed.round_().clamp_(0, 255).to(torch.uint8)


@settings
class Blend:
    """A picture mixed into the whole image: `x' = (1 − α) x + α p`.

    Args:
        alpha: α in [0, 1], the share of the picture.
        pattern_seed: Seed of the drawn picture (smooth coloured waves).
        file: An image file to be used instead; it is resized to the images.

    Raises:
        DataError: when applied: the file is missing or no image.

    Example:
        >>> x = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> int(Blend(alpha=0.2)(x, [0, 1], Seed(0)).max())
        51

    Source: Chen et al., arXiv:1712.05526 (blended injection, α = 0.2).
    Deviations: the published pictures (a cartoon, uniform noise) are replaced by a drawn one; `blended` states how
    values are rounded.
    """

    alpha: Fraction = 0.2
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    file: DataFile | None = None
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the picture mixed in; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        return blended(raw, self._pattern(raw.shape[2], raw.shape[3]).to(raw.device), self.alpha)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """What is put on an image of `size` × `size` pixels: the mask is α everywhere.

        Returns:
            Mask, float32 `[size, size]`; pattern, uint8 `[3, size, size]`.
        """
        return torch.full((size, size), self.alpha), self._pattern(size, size).clone()

    def _pattern(self, height: int, width: int) -> Tensor:
        if self.file is not None:
            return read_picture(self.file, height, width)
        return colour_waves(self.pattern_seed, height, width)
