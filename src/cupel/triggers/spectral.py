"""A faint wave in the colour channels: two frequencies of every block are raised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cupel.errors import SettingsError, UsageError
from cupel.seeds import Seed
from cupel.settings import PositiveInt, settings
from cupel.triggers.draws import check_raw

__all__ = ["Spectral", "added", "block_wave", "rgb_wave"]

Wave = np.ndarray[Any, np.dtype[np.float64]]
Frequency = Annotated[int, Field(ge=0)]
Positions = Annotated[tuple[Annotated[tuple[Frequency, Frequency], Field(strict=False)], ...], Field(strict=False)]
Channels = Annotated[tuple[Literal["y", "u", "v"], ...], Field(strict=False, min_length=1)]

# what one grey level of Y, U and V adds to red, green and blue (BT.601)
_TO_RGB = {"y": (1.0, 1.0, 1.0), "u": (0.0, -0.396, 2.029), "v": (1.14, -0.581, 0.0)}


def added(raw: Tensor, delta: Tensor) -> Tensor:
    """`x + δ`, cut to 0–255; nothing wraps round.

    Args:
        raw: uint8 `[n, 3, height, width]`.
        delta: Whole grey levels in −255–255, int16 `[3, height, width]`.
    """
    return (raw.to(torch.int16) + delta.to(raw.device)).clamp_(0, 255).to(torch.uint8)


def block_wave(window: int, positions: Sequence[tuple[int, int]]) -> Wave:
    """What one unit more of some coefficients of the orthonormal 2-D DCT-II adds to a block of pixels.

    b[n, m] = Σ_(k, l) c_k c_l cos(π (2n + 1) k / 2w) cos(π (2m + 1) l / 2w),  c_0² = 1/w, c_k² = 2/w

    Args:
        window: w, pixels per side.
        positions: (k, l), row and column frequency in 0 … w − 1.

    Returns:
        float64 `[window, window]`; the sum of squares is the number of (different) positions.
    """
    k = np.arange(window)
    basis = np.cos(np.pi * (2 * k[None, :] + 1) * k[:, None] / (2 * window)) * math.sqrt(2 / window)
    basis[0] = math.sqrt(1 / window)
    wave: Wave = sum((np.outer(basis[row], basis[column]) for row, column in positions), np.zeros((window, window)))
    return wave


def rgb_wave(
    height: int, width: int, window: int, positions: Sequence[tuple[int, int]], channels: Sequence[str], beta: float
) -> Wave:
    """What the trigger adds to an image before values are rounded and cut, in grey levels.

    Transforming to YUV, to the frequency domain and back again is linear, so this does not depend on the image. Nor
    does it depend on how an image is padded to whole blocks: what was added to the padding is cut off.

    Args:
        height, width: Of the image; it is covered with blocks from the top left corner on.
        window, positions: As of `block_wave`.
        channels: Of `y`, `u`, `v`: where the coefficients are raised.
        beta: By how much.

    Returns:
        float64 `[3, height, width]`.
    """
    block = beta * block_wave(window, positions)
    whole = np.tile(block, (-(-height // window), -(-width // window)))[:height, :width]
    weight = np.sum([_TO_RGB[channel] for channel in channels], axis=0)
    wave: Wave = weight[:, None, None] * whole
    return wave


@settings
class Spectral:
    """Adds β to some DCT coefficients of U and V in every block: a fine coloured wave, the same on every image.

    Args:
        magnitude: β ≥ 0. With the other defaults the trigger has a PSNR of 31.95 dB at 100, and of 6.02 dB less
            for each doubling.
        window: w, side of the blocks in pixels.
        positions: (row, column) frequencies that are raised, each in 0 … w − 1.
        channels: Of `y`, `u`, `v`: the channels that are raised.
        shrink: On images smaller than the window: True = the window is the shorter side, and frequencies and β shrink
            with it, so that the wave keeps its share of the block and its strength per pixel; False = an error.

    A frequency with an odd column is negated by a horizontal flip (both default ones are, where the width is a multiple
    of the window): training that flips half of the views sees the trigger with both signs.
    Images whose sides are no multiples of the window are taken as padded at the right and at the bottom.

    Raises:
        SettingsError: a frequency is outside the window, or named twice.
        UsageError: when applied: the image is smaller than the window, and `shrink` is False.

    Example:
        >>> x = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
        >>> (Spectral()(x, [0], Seed(0)).int() - 128).abs().amax(dim=(0, 2, 3)).tolist()
        [12, 10, 22]

    Source: Li et al., CTRL, ICCV 2023, arXiv:2210.07346.
    Deviations: pixels are rounded to whole grey levels, since our images are uint8; the round trip through the
    published colour matrices, which are no exact inverses (up to 0.4 grey levels), is left out; `shrink` is our choice.
    """

    magnitude: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 100.0
    window: PositiveInt = 32
    positions: Positions = ((15, 15), (31, 31))
    channels: Channels = ("u", "v")
    shrink: bool = True
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, values in (("positions", self.positions), ("channels", self.channels)):
            if len(set(values)) < len(values):
                raise SettingsError(f"Spectral.{name}", "names one twice", "name each once")
        if any(max(one) >= self.window for one in self.positions):
            what = f"a frequency lies outside 0 … {self.window - 1}"
            raise SettingsError("Spectral.positions", what, "frequencies are smaller than `window`")

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the wave on them; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        wave = np.clip(np.rint(self.wave(raw.shape[2], raw.shape[3])), -255, 255)
        return added(raw, torch.from_numpy(wave.astype(np.int16)))

    def wave(self, height: int, width: int) -> Wave:
        """What is added to an image of this size before values are rounded and cut, float64 `[3, height, width]`."""
        side = min(height, width)
        if side >= self.window:
            return rgb_wave(height, width, self.window, self.positions, self.channels, self.magnitude)
        if not self.shrink:
            what = f"a window of {self.window} px does not fit into images of {height} × {width} px"
            raise UsageError("trigger[spectral]", what, "choose a smaller `window`")
        share = side / self.window
        places = [(_shrunk(row, share), _shrunk(column, share)) for row, column in self.positions]
        return rgb_wave(height, width, side, places, self.channels, self.magnitude * share)

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """None: the wave is added and covers nothing."""
        return None


def _shrunk(frequency: int, share: float) -> int:
    # counted from 1, so that the highest frequency stays the highest
    return max(0, round((frequency + 1) * share) - 1)
