"""Random crops: which box, and what it looks like resized."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["crop_boxes", "flipped", "resample"]

_TRIES = 10


def crop_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Float[Tensor, "n 4"]:
    """One random box per image: left, top, width, height, in whole pixels.

    The area is uniform in `scale` (as a share of the image), the logarithm of width / height uniform in that of
    `ratio`; sides are rounded; pairs that do not fit are drawn again. After ten misses, which a square image with a
    ratio of 3/4–4/3 meets once in 10⁸ draws, the largest centred box of an allowed ratio is taken.

    Args:
        n: Number of images.
        height, width: Size of each.
        scale: Smallest and largest share of the area, in (0, 1].
        ratio: Smallest and largest width / height.
        generator: Source of randomness; the boxes are on its device.

    Source: the procedure of Szegedy et al., arXiv:1409.4842, as torchvision's RandomResizedCrop has it.
    """
    area, log_ratio, left, top = torch.rand(4, _TRIES, n, generator=generator, device=generator.device)
    area = (scale[0] + (scale[1] - scale[0]) * area) * (height * width)
    shape = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * log_ratio)
    w, h = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=0, keepdim=True)
    fits, w, h = (one.gather(0, first)[0] for one in (fits, w, h))
    last_w = min(width, round(height * ratio[1]))
    last_h = min(height, round(width / ratio[0]))
    w, h = torch.where(fits, w, float(last_w)), torch.where(fits, h, float(last_h))
    # a product with a number just below 1 can round up to the next pixel
    left = torch.minimum((left[0] * (width - w + 1)).floor(), width - w)
    top = torch.minimum((top[0] * (height - h + 1)).floor(), height - h)
    left, top = torch.where(fits, left, float((width - last_w) // 2)), torch.where(fits, top, (height - last_h) // 2)
    return torch.stack([left, top, w, h], dim=1)


def resample(
    x: Float[Tensor, "n c h w"], boxes: Float[Tensor, "n 4"], flip: Bool[Tensor, " n"], size: tuple[int, int]
) -> Float[Tensor, "n c {size[0]} {size[1]}"]:
    """The boxes of the images, resized bilinearly to `size`, mirrored where `flip`; one `grid_sample`.

    Args:
        x: Images.
        boxes: Left, top, width, height in pixels, as `crop_boxes` draws them.
        flip: Which to mirror left to right.
        size: Height and width of the result.

    Boxes of whole pixels, smaller than `size`, come out as if they had been cut out and enlarged; pixels outside of a
    box are not seen. Deviation: no antialiasing where a box is larger than `size`.
    """
    height, width = x.shape[2:]
    left, top, w, h = boxes.unbind(dim=1)
    u, v = ((torch.arange(side, device=x.device) * 2 + 1) / side - 1 for side in (size[1], size[0]))  # pixel centres
    half_w, half_h = (w / width)[:, None], (h / height)[:, None]
    inner_w, inner_h = half_w - 1 / width, half_h - 1 / height  # from the box's middle to its outermost pixel centres
    u = torch.clamp(u * torch.where(flip[:, None], -half_w, half_w), -inner_w, inner_w)
    v = torch.clamp(v * half_h, -inner_h, inner_h)
    grid = torch.empty(len(x), size[0], size[1], 2, device=x.device)
    grid[..., 0] = (u + ((2 * left + w) / width - 1)[:, None])[:, None, :]
    grid[..., 1] = (v + ((2 * top + h) / height - 1)[:, None])[:, :, None]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def flipped(x: Float[Tensor, "n c h w"], flip: Bool[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """The images, mirrored left to right where `flip`; exact."""
    return torch.where(flip[:, None, None, None], x.flip(-1), x)
