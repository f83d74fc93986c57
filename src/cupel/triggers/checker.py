"""The small checkerboard of attacks without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.settings import Fraction, PositiveInt, settings
from cupel.triggers.draws import check_raw
from cupel.triggers.published import Stamp

__all__ = ["Checker"]

_CELLS = ((0, 0, 255), (0, 255, 0), (255, 0, 255))


@settings
class Checker:
    """A grey 3 × 3 checkerboard.

    Args:
        place: `centre` = one at the middle (rows and columns 14–16 of 32); `corner` = one at the lower right corner, a
            pixel from the edges; `corners` = one at each; `full` = tiles over the whole image.
        cell: Side of a cell, in pixels.
        opacity: α in [0, 1]; `x' = (1 − α) x + α p`, rounded.

    Raises:
        UsageError: when applied: it does not fit into the image.

    Example:
        >>> x = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
        >>> int((Checker()(x, [0], Seed(0)) != x).any(dim=1).sum())
        9

    Source: Wang et al., arXiv:2404.06694, and its code (CIFAR-10).
    """

    place: Literal["centre", "corner", "corners", "full"] = "centre"
    cell: PositiveInt = 1
    opacity: Fraction = 1.0
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the checkerboard on them; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        inside, pattern = (part.to(raw.device) for part in self._stamp(raw.shape[2], raw.shape[3]))
        mixed = torch.lerp(raw.float(), pattern.float(), self.opacity).round().to(torch.uint8)
        return torch.where(inside, mixed, raw)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """What is put on an image of `size` × `size` pixels.

        Returns:
            Mask, float32 `[size, size]`, α where the checkerboard is; pattern, uint8 `[3, size, size]`.
        """
        inside, pattern = self._stamp(size, size)
        return inside.any(dim=0).float() * self.opacity, pattern

    def _stamp(self, height: int, width: int) -> Stamp:
        tile = torch.tensor(_CELLS, dtype=torch.uint8).repeat_interleave(self.cell, 0).repeat_interleave(self.cell, 1)
        side = len(tile)
        if side + 1 > min(height, width):
            what = f"a checkerboard of {side} px does not fit into images of {height} × {width} px"
            raise UsageError("trigger[checker]", what, "choose a smaller `cell`")
        inside = torch.zeros(height, width, dtype=torch.bool)
        pattern = torch.zeros(height, width, dtype=torch.uint8)
        if self.place == "full":
            down, right = -(-height // side), -(-width // side)
            return Stamp(~inside.expand(3, -1, -1), tile.repeat(down, right)[:height, :width].expand(3, -1, -1))
        bottom, end = height - side - 1, width - side - 1
        places = {
            "centre": [((height - 2) // 2 - side // 2, (width - 2) // 2 - side // 2)],
            "corner": [(bottom, end)],
            "corners": [(1, 1), (1, end), (bottom, 1), (bottom, end)],
        }[self.place]
        for top, left in places:
            inside[top : top + side, left : left + side] = True
            pattern[top : top + side, left : left + side] = tile
        return Stamp(inside.expand(3, -1, -1), pattern.expand(3, -1, -1))
