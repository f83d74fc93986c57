"""BYOL's augmentation: SimCLR's, with Gaussian blur and solarisation after the colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from cupel.augment.fused import SimCLRAugment
from cupel.errors import SettingsError
from cupel.settings import Fraction, Positive, settings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BYOLAugment", "blurred", "solarised"]

_REACH = 3.0  # standard deviations, beyond which the kernel is cut off
_HALF = 128 / 255  # Pillow's threshold


def blurred(x: Float[Tensor, "n 3 h w"], sigma: Float[Tensor, " n"], largest: float) -> Float[Tensor, "n 3 h w"]:
    """Gaussian blur with a width of its own for every image; beyond the border the outermost pixel goes on.

    Two matrix products per image, one for the rows and one for the columns.

    Args:
        x: Images.
        sigma: Standard deviation in pixels, ≥ 0; 0 leaves the image as it is.
        largest: Bound of `sigma`, known without asking the device.
    """
    across, along = (_blur_matrix(sigma, side, largest) for side in (x.shape[2], x.shape[3]))
    return across[:, None] @ x @ along[:, None].mT


def solarised(x: Float[Tensor, "n 3 h w"], where: Tensor) -> Float[Tensor, "n 3 h w"]:
    """Values of 128/255 and above inverted, in the images `where` it is True (bool `[n]`)."""
    return torch.where(where[:, None, None, None] & (x >= _HALF - 1e-6), 1 - x, x)


@settings
class BYOLAugment(SimCLRAugment):
    """SimCLR's crop, flip and colours, then Gaussian blur and solarisation.

    Args:
        blur: Probability of a Gaussian blur.
        min_sigma, max_sigma: Its standard deviation is uniform between them, in pixels of the view.
        solarise: Probability of inverting all values of 128/255 and above.

    With the defaults nothing is added, and the views are bit for bit those of `SimCLRAugment`.

    Raises:
        SettingsError: `min_sigma` > `max_sigma`.

    Source: Grill et al., BYOL, NeurIPS 2020, appendix B, arXiv:2006.07733; blur alone: Chen et al., MoCo v2,
    arXiv:2003.04297.
    Deviations: the blur is a Gaussian cut off at 3σ; Pillow's, which `exact` uses, is three box filters. They differ by
    0.002 on average on smooth images (0.02 in the outermost rows) for σ from 0.8 to 2; below 0.5 Pillow's is stronger.
    Published recipes for 224 pixels keep their σ in pixels whatever the size of the views.
    """

    blur: Fraction = 0.0
    min_sigma: Positive = 0.1
    max_sigma: Annotated[float, Field(gt=0, le=16)] = 2.0
    solarise: Fraction = 0.0
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_sigma > self.max_sigma:
            what = f"{self.min_sigma:g} is above max_sigma = {self.max_sigma:g}"
            raise SettingsError("BYOLAugment.min_sigma", what)

    @classmethod
    def preset(
        cls,
        name: Literal[
            "badencoder", "google", "references", "strong", "digits", "solo", "solo_second", "mocov2", "sslbkd_byol"
        ],
    ) -> BYOLAugment:
        """Settings for a purpose: those of `SimCLRAugment`, and the following.

        `solo`, `solo_second`: first and second views of BYOL and Barlow Twins in solo-learn's CIFAR scripts.
        `mocov2`: MoCo v2's, with crops of at least a fifth of the area.
        `sslbkd_byol`: BYOL as the SSL-Backdoor authors train it.
        """
        match name:
            case "solo":
                return cls(saturation=0.2)
            case "solo_second":
                return cls(saturation=0.2, solarise=0.2)
            case "mocov2":
                return cls(min_scale=0.2, blur=0.5)
            case "sslbkd_byol":
                return cls(min_scale=0.2, grayscale=0.1)
            case _:
                made = super().preset(name)
                assert isinstance(made, BYOLAugment)
                return made

    @torch.no_grad()
    def __call__(
        self, raw: UInt8[Tensor, "n 3 height width"], generator: torch.Generator
    ) -> Float[Tensor, "n 3 view_height view_width"]:
        """One view of each image; see `SimCLRAugment`."""
        x, n = SimCLRAugment.__call__(self, raw, generator), len(raw)
        with torch.autocast(raw.device.type, enabled=False):
            if self.blur > 0:
                sigma = torch.rand(n, generator=generator, device=generator.device)
                sigma = self.min_sigma + (self.max_sigma - self.min_sigma) * sigma
                sigma = torch.where(self._happens(n, self.blur, generator), sigma, 0.0)
                x = blurred(x, sigma.to(x.device), self.max_sigma).clamp_(0, 1)  # rounding
            if self.solarise > 0:
                x = solarised(x, self._happens(n, self.solarise, generator).to(x.device))
        return x.contiguous(memory_format=torch.channels_last)

    def more_steps(self) -> list[Any]:
        """Transforms of the exact chain after SimCLR's."""
        from torchvision import transforms as T

        steps: list[Any] = []
        if self.blur > 0:
            steps.append(T.RandomApply([_PillowBlur(self.min_sigma, self.max_sigma)], self.blur))
        if self.solarise > 0:
            steps.append(T.RandomSolarize(128, self.solarise))
        return steps


class _PillowBlur(torch.nn.Module):
    """Pillow's Gaussian blur with a random radius, as MoCo v2's code has it."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, image: Image) -> Image:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(self.low, self.high).item()))


def _blur_matrix(sigma: Float[Tensor, " n"], side: int, largest: float) -> Float[Tensor, "n side side"]:
    """Row i holds the weights of pixel i's neighbours; those outside fall to the border's pixel."""
    reach = int(_REACH * largest + 0.5)
    here = torch.arange(side, device=sigma.device)
    there = torch.arange(-reach, side + reach, device=sigma.device)
    distance = (there[None, :] - here[:, None]).float()
    spread = sigma.clamp_min(1e-3)[:, None, None]  # exp(−½·10⁶) is 0: only the pixel itself is left
    weight = torch.exp(-0.5 * (distance / spread).square()) * (distance.abs() <= _REACH * spread + 0.5)
    weight = weight / weight.sum(dim=2, keepdim=True)
    matrix = weight[:, :, reach : reach + side].clone()
    matrix[:, :, 0] += weight[:, :, :reach].sum(dim=2)
    matrix[:, :, -1] += weight[:, :, reach + side :].sum(dim=2)
    return matrix
