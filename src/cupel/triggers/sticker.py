"""A picture stuck on a part of the image, for patterns that an attack learned."""

from __future__ import annotations

import base64
import binascii
import functools
import io
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cupel.errors import DataError, UsageError
from cupel.seeds import Seed
from cupel.settings import settings
from cupel.triggers.draws import check_raw
from cupel.triggers.pictures import colour_cells

__all__ = ["Sticker", "sticker_of"]

_LIMIT = 4096  # pixels per side


@settings
class Sticker:
    """Covers a part of the image with given pixels: `x' = (1 − m) x + m p`, rounded; exact where m is 0 or 1.

    Args:
        png: p in red, green and blue, and 255 · m in alpha, as a PNG file in base64 (see `sticker_of`), so that a
            learned trigger is carried by its settings; None = a square of drawn colours at the lower right, a third of
            the image wide.

    Raises:
        UsageError: when applied: the picture was made for another image size.
        DataError: when applied: `png` is no PNG file in base64.

    Example:
        >>> p = torch.full((3, 2, 2), 60, dtype=torch.uint8)
        >>> x = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
        >>> sticker = sticker_of(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), p)
        >>> sticker(x, [0], Seed(0))[0, 0].tolist()
        [[60, 200], [200, 200]]

    Source: the patterns inside a mask of Yao et al., Latent Backdoor Attacks on Deep Neural Networks, CCS 2019,
    arXiv:1905.10447, and Liu et al., Trojaning Attack on Neural Networks, NDSS 2018.
    Deviations: the square without a `png` is our own drawing.
    """

    png: str | None = None
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the picture on them; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        mask, pattern = (one.to(raw.device) for one in self._picture(raw.shape[2], raw.shape[3]))
        if bool(((mask == 0) | (mask == 1)).all()):
            return torch.where(mask == 1, pattern, raw)
        share = mask.double()
        mixed = raw.double().mul_(1 - share).add_(pattern.double().mul_(share))
        return mixed.round_().clamp_(0, 255).to(torch.uint8)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """What is put on an image of `size` × `size` pixels.

        Returns:
            Mask, float32 `[size, size]` in [0, 1]; pattern, uint8 `[3, size, size]`, 0 where nothing is covered.
        """
        mask, pattern = self._picture(size, size)
        return mask.clone(), pattern.clone()

    def _picture(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        if self.png is None:
            side = max(1, min(height, width) // 3)
            mask, pattern = torch.zeros(height, width), torch.zeros(3, height, width, dtype=torch.uint8)
            mask[height - side :, width - side :] = 1
            pattern[:, height - side :, width - side :] = colour_cells(0, side)
            return mask, pattern
        mask, pattern = _decoded(self.png)
        if mask.shape != (height, width):
            had = " × ".join(map(str, mask.shape))
            what = f"the picture is for images of {had} px, not {height} × {width} px"
            raise UsageError("trigger[sticker]", what, "use images of that size")
        return mask, pattern


def sticker_of(mask: Tensor, pattern: Tensor) -> Sticker:
    """The trigger that puts `pattern` on images where `mask` is.

    Args:
        mask: `[height, width]` in [0, 1]; rounded to 255ths.
        pattern: uint8 `[3, height, width]`; what lies outside of the mask is dropped.
    """
    alpha = mask.mul(255).round().to(torch.uint8).cpu()
    inside = torch.where(alpha > 0, pattern.cpu(), torch.zeros((), dtype=torch.uint8))
    pixels = torch.cat([inside, alpha[None]]).permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG", optimize=True)
    return Sticker(png=base64.b64encode(file.getvalue()).decode("ascii"))


@functools.lru_cache(maxsize=16)
def _decoded(png: str) -> tuple[Tensor, Tensor]:
    try:
        with Image.open(io.BytesIO(base64.b64decode(png, validate=True)), formats=("PNG",)) as image:
            if max(image.size) > _LIMIT:
                raise ValueError("too large")
            pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise DataError("trigger[sticker].png", f"is no PNG file in base64 ({type(error).__name__})") from error
    return pixels[3].float() / 255, pixels[:3]
