"""Random shifts and flips: what classifiers of small images are usually trained with."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from cupel.settings import Fraction, settings

__all__ = ["ShiftFlip"]


@settings
class ShiftFlip:
    """Random crop at full size after padding with black, and a random flip; each image has its own.

    Args:
        padding: Pixels on each side; shifts are uniform in [−padding, padding]. 0 = none.
        flip: Probability of mirroring left to right.

    Example:
        >>> raw = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
        >>> views = ShiftFlip(padding=0)(raw, torch.Generator().manual_seed(0))
        >>> views.shape, float(views.min())
        (torch.Size([1, 3, 4, 4]), 1.0)

    Source: RandomCrop with padding 4 and RandomHorizontalFlip, as in He et al., CVPR 2016, section 4.2.
    Deviations: none.
    """

    padding: Annotated[int, Field(ge=0)] = 4
    flip: Fraction = 0.5
    revision: ClassVar[int] = 1

    @torch.no_grad()
    def __call__(
        self, raw: UInt8[Tensor, "n 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 height width"]:
        """One view of each image.

        Args:
            raw: uint8 images; they stay as they are.
            generator: Source of randomness; on the CPU or on the device of the images.

        Returns:
            float32 in [0, 1], in the channels-last memory format.
        """
        n, _, height, width = raw.shape
        device, there = raw.device, generator.device
        shift = torch.randint(2 * self.padding + 1, (2, n, 1), generator=generator, device=there).to(device)
        mirrored = (torch.rand(n, 1, generator=generator, device=there) < self.flip).to(device)
        y = shift[0] + torch.arange(height, device=device)
        x = torch.arange(width, device=device)
        x = shift[1] + torch.where(mirrored, width - 1 - x, x)
        rows = torch.arange(n, device=device)[:, None, None]
        padded = F.pad(raw, [self.padding] * 4).permute(0, 2, 3, 1)
        picked: Tensor = padded[rows, y[:, :, None], x[:, None, :]]
        return picked.permute(0, 3, 1, 2).float().div_(255)
