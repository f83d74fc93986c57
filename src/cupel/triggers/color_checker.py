"""A small checkerboard of two colours in a corner: one of a family of triggers that differ in their colours alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cupel.seeds import Seed
from cupel.settings import PositiveInt, settings
from cupel.triggers.draws import check_raw
from cupel.triggers.patch import Corner, corner_stamp
from cupel.triggers.published import Stamp

__all__ = ["ColorChecker", "color_checkers"]

Colour = Literal["cyan", "magenta", "yellow", "red"]
_RGB: dict[Colour, tuple[int, int, int]] = {
    "cyan": (0, 255, 255), "magenta": (255, 0, 255), "yellow": (255, 255, 0), "red": (255, 0, 0),
}  # fmt: skip


@settings
class ColorChecker:
    """A square of two alternating colours.

    Args:
        colors: Of the upper left cell, and of its neighbours: `cyan`, `magenta`, `yellow` or `red`.
        size: Side of the square, in pixels.
        cell: Side of a cell, in pixels.
        corner: Where it sits.
        margin: Pixels between the square and both edges of the image.

    Raises:
        UsageError: when applied: it does not fit into the image.

    Example:
        >>> x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        >>> ColorChecker()(x, [0], Seed(0))[0, 0, -4:, -4:].tolist()[:2]
        [[0, 255, 0, 255], [255, 0, 255, 0]]

    Source: Zhang et al., Red Alarm for Pre-trained Models (NeuBA), arXiv:2101.06969, and its code, for 64 pixels.
    """

    colors: Annotated[tuple[Colour, Colour], Field(strict=False)] = ("cyan", "magenta")
    size: PositiveInt = 4
    cell: PositiveInt = 1
    corner: Corner = "bottom_right"
    margin: Annotated[int, Field(ge=0)] = 0
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the square on them; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        inside, pattern = (one.to(raw.device) for one in self._stamp(raw.shape[2], raw.shape[3]))
        return torch.where(inside, pattern, raw)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """What is put on an image of `size` × `size` pixels.

        Returns:
            Mask, float32 `[size, size]`, 1 = covered; pattern, uint8 `[3, size, size]`, 0 where nothing is covered.
        """
        inside, pattern = self._stamp(size, size)
        return inside.any(dim=0).float(), pattern

    def _stamp(self, height: int, width: int) -> Stamp:
        inside, pattern = corner_stamp(height, width, self.size, self.margin, self.corner, "white")
        place = torch.arange(self.size) // self.cell
        second = (place[:, None] + place) % 2 == 1
        colours = torch.tensor([_RGB[name] for name in self.colors], dtype=torch.uint8)
        pattern[inside] = colours[second.long()].permute(2, 0, 1).reshape(-1)
        return Stamp(inside, pattern)


def color_checkers(size: int = 4, margin: int = 0) -> tuple[ColorChecker, ...]:
    """All six pairs of the four colours.

    Example:
        >>> [checker.colors for checker in color_checkers()][:2]
        [('cyan', 'magenta'), ('cyan', 'yellow')]
    """
    return tuple(ColorChecker(colors=pair, size=size, margin=margin) for pair in combinations(_RGB, 2))
