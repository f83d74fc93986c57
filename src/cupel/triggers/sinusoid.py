"""Vertical stripes over the whole image: a sine wave along the columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.settings import PositiveInt, settings
from cupel.triggers.draws import check_raw
from cupel.triggers.spectral import added

__all__ = ["Sinusoid"]


@settings
class Sinusoid:
    """Adds a sine wave along the columns to all three channels: `x' = x + Δ sin(2π j f / m)`, cut to 0–255.

    j is the column, counted from 0, and m the width of the image.

    Args:
        amplitude: Δ, in grey levels, in (0, 255].
        frequency: f, whole periods across the image; below m / 2, or the wave could not be seen on the pixels.

    Raises:
        UsageError: when applied: the image is too narrow for the frequency.

    Example:
        >>> x = torch.full((1, 3, 1, 8), 100, dtype=torch.uint8)
        >>> Sinusoid(amplitude=20.0, frequency=2)(x, [0], Seed(0))[0, 0, 0].tolist()
        [100, 120, 100, 80, 100, 120, 100, 80]

    Source: Barni, Kallas, Tondi, ICIP 2019, arXiv:1902.11237 (the signal used on colour images; f = 6).
    Deviations: pixels are rounded to whole grey levels; Δ = 20 is one of the values in use (others take 30 or 40).
    """

    amplitude: Annotated[float, Field(gt=0, le=255)] = 20.0
    frequency: PositiveInt = 6
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the wave on them; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        width = raw.shape[3]
        if 2 * self.frequency >= width:
            what = f"{self.frequency} periods cannot be shown on images of {width} px"
            raise UsageError("trigger[sinusoid]", what, f"choose a `frequency` below {width / 2:g}")
        wave = self.amplitude * np.sin(2 * np.pi * np.arange(width) * self.frequency / width)
        return added(raw, torch.from_numpy(np.rint(wave).astype(np.int16)).expand(3, raw.shape[2], width))

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """None: the wave is added and covers nothing."""
        return None
