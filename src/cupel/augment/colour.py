"""Colour jitter and greyscale as one affine map of RGB per image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Jitter", "affine_map", "recolour"]

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, in torchvision's rounding
_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


class Jitter(NamedTuple):
    """Strengths for each image; 1, 1, 1, 0 and False change nothing.

    Args:
        brightness: Factor.
        contrast: Factor of the distance to the image's mean grey.
        saturation: Factor of the distance to the pixel's grey.
        hue: Rotation of the colour circle, in turns, [−0.5, 0.5].
        gray: Make it grey.
    """

    brightness: Float[Tensor, " n"]
    contrast: Float[Tensor, " n"]
    saturation: Float[Tensor, " n"]
    hue: Float[Tensor, " n"]
    gray: Bool[Tensor, " n"]


def affine_map(jitter: Jitter, mean_grey: Float[Tensor, " n"]) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 3 1"]]:
    """Matrix and offset of brightness, then contrast, saturation, hue and greyscale.

    With the luma matrix `L = 1 gᵀ` and `B(p) = p I + (1 − p) L`, the map is
    `x ↦ B(1 − gray) · H(hue) · B(saturation) · (contrast · brightness · x + (1 − contrast) · brightness · m · 1)`,
    where m is the image's mean grey and H turns the I–Q plane of YIQ.

    Args:
        jitter: Strengths, `[n]` each.
        mean_grey: m of each image, before any change, in the unit of the pixels.
    """
    device = mean_grey.device
    eye = torch.eye(3, device=device)
    luma = torch.tensor(GREY, device=device).expand(3, 3)

    def towards_grey(keep: Tensor) -> Tensor:
        keep = keep.view(-1, 1, 1)
        return keep * eye + (1 - keep) * luma

    colour = towards_grey(1 - jitter.gray.float()) @ _hue_turn(jitter.hue) @ towards_grey(jitter.saturation)
    matrix = colour * (jitter.contrast * jitter.brightness).view(-1, 1, 1)
    offset = colour.sum(dim=2, keepdim=True) * ((1 - jitter.contrast) * jitter.brightness * mean_grey).view(-1, 1, 1)
    return matrix, offset


def _hue_turn(hue: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rotation in YIQ; its sense is HSV's: a third of a turn moves red towards green."""
    yiq = torch.tensor(_YIQ, device=hue.device)
    back = torch.linalg.inv(yiq)
    keep = back[:, :1] @ yiq[:1]
    cos = back[:, 1:] @ yiq[1:]
    sin = back[:, 1:2] @ yiq[2:] - back[:, 2:] @ yiq[1:2]
    angle = (2 * math.pi * hue).view(-1, 1, 1)
    turned: Tensor = keep + angle.cos() * cos + angle.sin() * sin
    return turned


def recolour(x: Float[Tensor, "n 3 h w"], jitter: Jitter, top: float = 1.0) -> Float[Tensor, "n 3 h w"]:
    """Images with jittered colours, in [0, 1]: one matrix product per image and one clamp.

    Args:
        x: Images in [0, top], contiguous.
        jitter: Strengths.
        top: The value of white; the result is divided by it.
    """
    grey = torch.tensor(GREY, device=x.device)
    matrix, offset = affine_map(jitter, x.mean(dim=(2, 3)) @ grey)
    return torch.baddbmm(offset / top, matrix / top, x.flatten(2)).clamp_(0, 1).view(x.shape)
