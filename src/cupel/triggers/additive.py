"""A picture that is added to the image, for triggers that an attack learned."""

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
from cupel.triggers.pictures import apple
from cupel.triggers.spectral import added

__all__ = ["Additive", "png_of"]

_LIMIT = 4096  # pixels per side


@settings
class Additive:
    """Adds a picture to the image: `x' = min(x + t, 255)`; where the picture is black, nothing changes.

    Args:
        png: t as a PNG file in base64, of the size of the images (see `png_of`), so that a learned trigger is carried
            by its settings; None = the silhouette of an apple in white.
        wrap_uint8: `x' = (x + t) mod 256` instead, to repeat results of code that lets bright pixels wrap round.

    Raises:
        UsageError: when applied: the picture was made for another image size.
        DataError: when applied: `png` is no PNG file in base64.

    Example:
        >>> t = torch.zeros(3, 2, 2, dtype=torch.uint8)
        >>> t[:, 0, 0] = 60
        >>> x = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
        >>> Additive(png=png_of(t))(x, [0], Seed(0))[0, 0].tolist()
        [[255, 200], [200, 200]]

    Source: the poisoning form of Liu et al., Trojaning Attack on Neural Networks, NDSS 2018, in BackdoorBench
    (Wu et al., NeurIPS 2022, arXiv:2206.12654).
    Deviations: values are cut at 255 unless `wrap_uint8`; the apple is our own drawing.
    """

    png: str | None = None
    wrap_uint8: bool = False
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the picture added; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        delta = self.picture(raw.shape[2], raw.shape[3]).to(torch.int16)
        if self.wrap_uint8:
            return ((raw.to(torch.int16) + delta.to(raw.device)) % 256).to(torch.uint8)
        return added(raw, delta)

    def picture(self, height: int, width: int) -> Tensor:
        """t, uint8 `[3, height, width]`; not to be written to."""
        if self.png is None:
            return apple(height, width).to(torch.uint8).mul(255).expand(3, height, width)
        made = _decoded(self.png)
        if made.shape[1:] != (height, width):
            had = " × ".join(map(str, made.shape[1:]))
            what = f"the picture is for images of {had} px, not {height} × {width} px"
            raise UsageError("trigger[additive]", what, "use images of that size")
        return made

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """None: the picture is added and covers nothing."""
        return None


def png_of(picture: Tensor) -> str:
    """A picture, uint8 `[3, height, width]`, as a PNG file in base64; nothing is lost."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


@functools.lru_cache(maxsize=16)
def _decoded(png: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(base64.b64decode(png, validate=True)), formats=("PNG",)) as image:
            if max(image.size) > _LIMIT:
                raise ValueError("too large")
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise DataError("trigger[additive].png", f"is no PNG file in base64 ({type(error).__name__})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
