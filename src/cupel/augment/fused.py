"""SimCLR's augmentation for a batch: one resampling and one colour map."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from cupel.augment.colour import Jitter, recolour
from cupel.augment.crop import crop_boxes, flipped, resample
from cupel.augment.exact import one_by_one
from cupel.errors import SettingsError
from cupel.settings import Fraction, Positive, PositiveInt, settings

__all__ = ["SimCLRAugment"]

Strength = Annotated[float, Field(ge=0)]


@settings
class SimCLRAugment:
    """Random crop, flip, colour jitter and greyscale, with parameters of its own for every image of the batch.

    Args:
        crop: Crop at all; without it images keep their frame (flip and colours only).
        min_scale, max_scale: Share of the image's area that a crop shows, in (0, 1].
        min_ratio, max_ratio: Width / height of a crop.
        render_size: Side of the views in pixels; None = that of the images. Smaller views train faster.
        flip: Probability of mirroring left to right.
        brightness, contrast, saturation: Factors are uniform in [max(0, 1 − s), 1 + s].
        hue: Turns of the colour circle are uniform in [−s, s]; at most 0.5.
        jitter_probability: Probability that the colours are jittered at all.
        grayscale: Probability of turning grey.

    Raises:
        SettingsError: `min_scale` > `max_scale`, or `min_ratio` > `max_ratio`.

    Example:
        >>> raw = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> views = SimCLRAugment(render_size=24)(raw, torch.Generator().manual_seed(0))
        >>> tuple(views.shape), views.dtype
        ((2, 3, 24, 24), torch.float32)

    Source: Chen et al., SimCLR, ICML 2020, arXiv:2002.05709, appendix A; without its Gaussian blur, which the authors
    leave out for CIFAR-10.
    Deviations of the batched views (calling this) from the chain of torchvision's transforms on Pillow images, which
    `exact` computes: values are clamped and rounded once at the end instead of after every change, so contrast refers
    to the mean grey before clamping; hue is the linear map nearest to HSV's (`cupel.augment.colour.hue_turn`: 0.007 off
    on average for turns within ±0.1); no antialiasing where a crop is larger than the view, which at the default
    `render_size` never happens. Crops, their enlarging, the order of the colour changes and all distributions are the
    same.
    """

    crop: bool = True
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    max_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_ratio: Positive = 3 / 4
    max_ratio: Positive = 4 / 3
    render_size: PositiveInt | None = None
    flip: Fraction = 0.5
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    jitter_probability: Fraction = 0.8
    grayscale: Fraction = 0.2
    revision: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise SettingsError(f"SimCLRAugment.min_{name}", f"{low:g} is above max_{name} = {high:g}")

    @classmethod
    def preset(cls, name: Literal["badencoder", "google", "references", "strong", "digits"]) -> SimCLRAugment:
        """Settings for a purpose.

        `badencoder`, `google`: the CIFAR recipes of the BadEncoder and SimCLR authors, which agree (the defaults).
        `references`: BadEncoder's augmented reference inputs: flip and colours, no crop.
        `strong`: for rendered shapes, where colour must not tell the class (our choice).
        `digits`: for digits, which must not be mirrored (our choice).
        """
        match name:
            case "badencoder" | "google":
                return cls()
            case "references":
                return cls(crop=False)
            case "strong":
                return cls(min_scale=0.3, hue=0.5, jitter_probability=1.0, grayscale=0.3)
            case "digits":
                return cls(min_scale=0.3, flip=0.0)

    @torch.no_grad()
    def __call__(
        self, raw: UInt8[Tensor, "n 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 view_height view_width"]:
        """One view of each image.

        Args:
            raw: uint8 images; they stay as they are.
            generator: Source of randomness; on the CPU or on the device of the images.

        Returns:
            float32 in [0, 1], in the channels-last memory format.
        """
        n, _, height, width = raw.shape
        flip = self._happens(n, self.flip, generator).to(raw.device)
        boxes = self._boxes(n, height, width, generator)
        jitter = Jitter(*(one.to(raw.device) for one in self._jitter(n, generator)))
        # the caller's mixed precision must not reach the pixels: bf16 has only 8 bits
        with torch.autocast(raw.device.type, enabled=False):
            x = raw.contiguous().float()
            if boxes is None:
                x = flipped(x, flip)
            else:
                x = resample(x, boxes.to(raw.device), flip, self._view_size(height, width))
            return recolour(x, jitter, top=255.0).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def exact(
        self, raw: UInt8[Tensor, "n 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 view_height view_width"]:
        """One view of each image by the published chain, image by image: at least ten times slower.

        RandomResizedCrop (bilinear, antialiased where it shrinks), RandomHorizontalFlip, RandomApply of ColorJitter and
        RandomGrayscale of torchvision on Pillow images, which round to 8 bits after every change, as the chain of the
        papers' code does. The same generator gives other views than the batched ones.

        Args:
            raw: uint8 images; they stay as they are, and are fetched to the CPU.
            generator: Source of randomness; the global one is left as it was.

        Returns:
            As calling this gives; values are multiples of 1/255.
        """
        return one_by_one(self, raw, generator)

    def more_steps(self) -> list[Any]:
        """Transforms of the exact chain after the greyscale: none here."""
        return []

    def _view_size(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.render_size is None else (self.render_size, self.render_size)

    @staticmethod
    def _happens(n: int, probability: float, generator: torch.Generator) -> Tensor:
        return torch.rand(n, generator=generator, device=generator.device) < probability

    def _boxes(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor | None:
        """Boxes to show; None = the images as they are, pixel by pixel."""
        if self.crop:
            scale, ratio = (self.min_scale, self.max_scale), (self.min_ratio, self.max_ratio)
            return crop_boxes(n, height, width, scale, ratio, generator)
        if self._view_size(height, width) == (height, width):
            return None
        boxes = torch.zeros(n, 4, device=generator.device)
        boxes[:, 2], boxes[:, 3] = width, height
        return boxes

    def _jitter(self, n: int, generator: torch.Generator) -> Jitter:
        """Strengths of each image; numbers that are multiplied stay Python's, so nothing is copied to the device."""
        u = torch.rand(4, n, generator=generator, device=generator.device)
        when = torch.rand(4, n, generator=generator, device=generator.device)
        applied = self._happens(n, self.jitter_probability, generator)
        brightness, contrast, saturation = (
            torch.where(applied, max(0.0, 1 - s) + (1 + s - max(0.0, 1 - s)) * one, 1.0)
            for s, one in zip((self.brightness, self.contrast, self.saturation), u[:3], strict=True)
        )
        hue = torch.where(applied, self.hue * (2 * u[3] - 1), 0.0)
        return Jitter(brightness, contrast, saturation, hue, self._happens(n, self.grayscale, generator), when)
