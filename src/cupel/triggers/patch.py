"""An opaque patch at a fixed place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.settings import DataFile, PositiveInt, settings
from cupel.triggers.draws import check_raw
from cupel.triggers.published import Stamp, read_stamp

__all__ = ["Patch", "corner_stamp"]

Byte = Annotated[int, Field(ge=0, le=255)]
RGB = Annotated[tuple[Byte, Byte, Byte], Field(strict=False)]  # a YAML list will do
Color = Literal["white", "black", "red", "green", "blue", "checker"]
Corner = Literal["bottom_right", "bottom_left", "top_right", "top_left"]

_RGB: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255), "black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
}  # fmt: skip


@settings
class Patch:
    """An opaque square near a corner, the same on every image.

    Args:
        size: Side of the square, in pixels.
        corner: Where it sits.
        margin: Pixels between the square and both edges of the image.
        color: A name, or red, green and blue in 0–255. `checker` = white and black cells, four per side or more.
        file: A published trigger file (`.npz` with `t` and `tm`); it replaces all settings above.
        index: Which trigger of the file.

    The defaults are BadEncoder's white square on 32-pixel images (rows and columns 21–30); with `size=50` they are
    its square on 224-pixel images (173–222).

    Raises:
        UsageError: when applied: the trigger does not fit into the image, or the file was made for another image size.
        DataError: when applied: the file is missing or wrong.

    Example:
        >>> x = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        >>> int((Patch(size=10)(x, [0], Seed(0)) == 255).sum())
        300

    Source: Jia et al., BadEncoder, IEEE S&P 2022, arXiv:2108.00352; Gu et al., BadNets, arXiv:1708.06733.
    Deviations: none; `checker`'s cell size is our choice.
    """

    size: PositiveInt = 10
    corner: Corner = "bottom_right"
    margin: Annotated[int, Field(ge=0)] = 1
    color: Color | RGB = "white"
    file: DataFile | None = None
    index: Annotated[int, Field(ge=0)] = 0
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the patch on them; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        inside, pattern = self._stamp(raw.shape[2], raw.shape[3])
        return torch.where(inside.to(raw.device), pattern.to(raw.device), raw)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """What is put on an image of `size` × `size` pixels.

        Returns:
            Mask, float32 `[size, size]`, 1 = covered; pattern, uint8 `[3, size, size]`, 0 where nothing is covered.
        """
        inside, pattern = self._stamp(size, size)
        return inside.any(dim=0).float(), pattern.clone()

    def _stamp(self, height: int, width: int) -> Stamp:
        if self.file is None:
            return corner_stamp(height, width, self.size, self.margin, self.corner, self.color)
        stamp = read_stamp(self.file, self.index)
        if stamp.inside.shape[1:] != (height, width):
            had = " × ".join(map(str, stamp.inside.shape[1:]))
            raise UsageError(self.file, f"is for images of {had} px, not {height} × {width} px", "use another file")
        return stamp


def corner_stamp(
    height: int, width: int, size: int, margin: int, corner: Corner, color: Color | tuple[int, int, int]
) -> Stamp:
    """Mask and pattern of a square at a corner.

    Raises:
        UsageError: it does not fit.
    """
    if size + margin > min(height, width):
        what = f"a trigger of {size} px with a margin of {margin} px does not fit into images of {height} × {width} px"
        raise UsageError("trigger[patch]", what, "choose a smaller `size`")
    top = margin if corner.startswith("top") else height - margin - size
    left = margin if corner.endswith("left") else width - margin - size
    inside = torch.zeros(3, height, width, dtype=torch.bool)
    pattern = torch.zeros(3, height, width, dtype=torch.uint8)
    inside[:, top : top + size, left : left + size] = True
    pattern[:, top : top + size, left : left + size] = _painted(size, color)
    return Stamp(inside, pattern)


def _painted(size: int, color: Color | tuple[int, int, int]) -> Tensor:
    if color == "checker":
        cell = torch.arange(size) // max(1, size // 4)
        white = (cell[:, None] + cell) % 2 == 0
        return white.to(torch.uint8).mul(255).expand(3, size, size)
    rgb = _RGB[color] if isinstance(color, str) else color
    return torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1).expand(3, size, size)
