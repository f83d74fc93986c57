"""How different two images look: structure, noise and colour. Differentiable; images in [0, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["colour_distance", "hsvl", "psnr", "ssim"]

_K1, _K2, _SIDE, _SIGMA = 0.01, 0.03, 11, 1.5


def ssim(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of each pair, in [−1, 1]; 1 = equal.

    Gaussian window of 11 × 11 pixels, σ = 1.5 (smaller for smaller images), at the places where it lies inside the
    image; the mean over places and channels. K₁ = 0.01, K₂ = 0.03.

    Source: Wang et al., Image quality assessment, IEEE TIP 2004.
    """
    height, width = a.shape[-2:]
    across, along = (_window(side, a) for side in (height, width))
    with torch.autocast(a.device.type, enabled=False):  # differences of squares need all digits
        flat = torch.stack([a, b, a * a, b * b, a * b]).reshape(-1, 1, height, width)
        blurred = F.conv2d(F.conv2d(flat, across.view(1, 1, -1, 1)), along.view(1, 1, 1, -1))
    mean_a, mean_b, aa, bb, ab = blurred.reshape(5, len(a), -1)
    var_a, var_b, cov = aa - mean_a.square(), bb - mean_b.square(), ab - mean_a * mean_b
    light = (2 * mean_a * mean_b + _K1**2) / (mean_a.square() + mean_b.square() + _K1**2)
    of_place: Tensor = light * (2 * cov + _K2**2) / (var_a + var_b + _K2**2)
    return of_place.mean(dim=1)


def _window(side: int, like: Tensor) -> Tensor:
    count = min(_SIDE, side)
    place = torch.arange(count, dtype=like.dtype, device=like.device) - (count - 1) / 2
    return (-place.square() / (2 * _SIGMA**2)).softmax(dim=0)


def psnr(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], cap: float = 40.0) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each pair in dB, `cap` at most (equal images have no finite one).

    Example:
        >>> x = torch.zeros(1, 3, 2, 2)
        >>> psnr(x, x + 0.1).round().tolist(), psnr(x, x).tolist()
        ([20.0], [40.0])
    """
    error = (a - b).square().mean(dim=(1, 2, 3))
    return (-10 / math.log(10)) * error.clamp_min(10 ** (-cap / 10)).log()


def hsvl(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 4 h w"]:
    """Hue (in turns, [0, 1)), saturation and value of HSV, and lightness of HLS; greys have hue and saturation 0.

    Gradients of hue and saturation are 0 at greys and at black, where they have none.

    Example:
        >>> [round(v, 3) for v in hsvl(torch.tensor([0.0, 1.0, 0.5]).view(1, 3, 1, 1)).flatten().tolist()]
        [0.417, 1.0, 1.0, 0.5]
    """
    top, low = x.amax(dim=1), x.amin(dim=1)
    delta = top - low
    coloured, lit = delta > 1e-4, top > 1e-4
    red, green, blue = x.unbind(dim=1)
    width = torch.where(coloured, delta, 1)
    sixths = torch.where(
        red == top,
        (green - blue) / width,
        torch.where(green == top, 2 + (blue - red) / width, 4 + (red - green) / width),
    )
    hue = torch.where(coloured, (sixths / 6) % 1, 0)
    saturation = torch.where(lit & coloured, delta / torch.where(lit, top, 1), 0)
    return torch.stack([hue, saturation, top, (top + low) / 2], dim=1)


def colour_distance(a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Mean squared differences of hue (the short way round), saturation, value and lightness, added up.

    Example:
        >>> red, green = torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
        >>> red[:, 0] = green[:, 1] = 1
        >>> round(float(colour_distance(red, green)), 4)  # a third of a turn, and nothing else
        0.1111

    Source: Zhang et al., arXiv:2405.14672, where it keeps a learned trigger apart from augmentations; that hue is
    circular is our correction.
    """
    change = hsvl(a) - hsvl(b)
    hue = change[:, :1].abs()
    change = torch.cat([torch.minimum(hue, 1 - hue), change[:, 1:]], dim=1)
    return change.square().mean(dim=(0, 2, 3)).sum()
