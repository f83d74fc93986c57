"""Distortions between the attacker's stamp and the victim's classifier: does the trigger survive them?"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from cupel.errors import UsageError
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import PositiveInt, registry, settings

__all__ = ["DISTORTIONS", "Distortion", "Jpeg", "Resize", "Shift"]


class Distortion(Protocol):
    """What happens to an image on its way to the classifier, or to the trigger on its way onto the image."""

    @property
    def title(self) -> str:
        """Short and fit for the name of a metric, e.g. `jpeg_50`."""
        ...

    def trigger(self, trigger: Trigger[Tensor] | None, /) -> Trigger[Tensor] | None:
        """What is put on an image in place of `trigger`; None = images without a trigger stay as they are."""
        ...


@settings
class Jpeg:
    """JPEG compression of the finished image.

    Args:
        quality: As libjpeg counts it, 1 (worst) to 95; chroma at half the resolution, as is usual.

    Example:
        >>> Jpeg(quality=50).title
        'jpeg_50'
    """

    quality: Annotated[int, Field(ge=1, le=95)] = 75
    revision: ClassVar[int] = 1

    @property
    def title(self) -> str:
        """`jpeg_` and the quality."""
        return f"jpeg_{self.quality}"

    def __call__(self, raw: Tensor, /) -> Tensor:
        """uint8 images `[n, 3, height, width]`, each written and read again."""
        done = [self._again(one.permute(1, 2, 0).contiguous().numpy()) for one in raw.cpu()]
        return torch.stack(done).to(raw.device) if done else raw.clone()

    def _again(self, pixels: np.ndarray[Any, Any]) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)

    def trigger(self, trigger: Trigger[Tensor] | None, /) -> Trigger[Tensor]:
        """`trigger`, then the compression."""
        return _After(self, trigger)


@settings
class Resize:
    """The finished image made smaller and brought back to its size, both bilinear with antialiasing.

    Args:
        size: Side of the small image, in pixels; smaller than the image.

    Example:
        >>> x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        >>> x[:, :, 3, 3] = 255  # a single pixel
        >>> int(Resize(size=4)(x).max()) < 128
        True
    """

    size: PositiveInt = 16
    revision: ClassVar[int] = 1

    @property
    def title(self) -> str:
        """`resize_` and the side."""
        return f"resize_{self.size}"

    def __call__(self, raw: Tensor, /) -> Tensor:
        """uint8 images `[n, 3, height, width]`, down and up.

        Raises:
            UsageError: the images are not larger than `size`.
        """
        height, width = raw.shape[-2:]
        if self.size >= min(height, width):
            what = f"images of {height} × {width} px are not larger than {self.size} px"
            raise UsageError("distortions[resize].size", what, "choose a smaller `size`")
        x = raw.float()
        for size in ((self.size, self.size), (height, width)):
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
            x = x.round().clamp(0, 255)  # a file between the two holds whole numbers
        return x.to(torch.uint8)

    def trigger(self, trigger: Trigger[Tensor] | None, /) -> Trigger[Tensor]:
        """`trigger`, then the change of size."""
        return _After(self, trigger)


@settings
class Shift:
    """The trigger put elsewhere: so many rows and as many columns towards the middle of the image.

    The image itself stays where it is, so accuracy without a trigger is not touched.

    Args:
        pixels: How far, in each direction.

    What leaves the image at an edge comes in at the other one; that concerns triggers that cover the whole image.
    """

    pixels: PositiveInt = 1
    revision: ClassVar[int] = 1

    @property
    def title(self) -> str:
        """`shift_` and the pixels."""
        return f"shift_{self.pixels}"

    def trigger(self, trigger: Trigger[Tensor] | None, /) -> Trigger[Tensor] | None:
        """`trigger` at its other place."""
        return None if trigger is None else _Moved(trigger, self.pixels)


@dataclasses.dataclass(frozen=True)
class _After:
    """A trigger, then a distortion of the finished image."""

    distortion: Jpeg | Resize
    inner: Trigger[Tensor] | None

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        return self.distortion(raw if self.inner is None else self.inner(raw, ids, seed))


@dataclasses.dataclass(frozen=True)
class _Moved:
    """A trigger at another place, whatever it does to an image: the image is rolled under it and rolled back."""

    inner: Trigger[Tensor]
    pixels: int

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        down, right = self._way(raw.shape[-1])
        return self.inner(raw.roll((-down, -right), (-2, -1)), ids, seed).roll((down, right), (-2, -1))

    def _way(self, size: int) -> tuple[int, int]:
        """Rows down and columns to the right that lead towards the middle; up and left for what has no place."""
        known = getattr(self.inner, "mask_and_pattern", lambda size: None)(size)
        if known is None:
            return -self.pixels, -self.pixels
        mask = torch.as_tensor(known[0]).float()
        at = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        above, left = float((mask.sum(1) * at).sum()) < 0, float((mask.sum(0) * at).sum()) < 0
        return self.pixels if above else -self.pixels, self.pixels if left else -self.pixels


DISTORTIONS: Mapping[str, type] = registry("distortions", {"jpeg": Jpeg, "resize": Resize, "shift": Shift})
"""By name, as in `downstream.distortions`."""
