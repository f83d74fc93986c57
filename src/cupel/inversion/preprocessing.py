"""What a user may do to images before a model sees them, with gradients, so that triggers can be made to last."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cupel.seeds import Seed

__all__ = ["PREPROCESSINGS", "Preprocessing", "drawn_preprocessing", "preprocessed"]

Preprocessing = Literal["identity", "blur", "median", "quantise", "resize", "noise"]
PREPROCESSINGS: tuple[Preprocessing, ...] = get_args(Preprocessing)
_SIGMA, _LEVELS, _SHRINK, _NOISE = 0.7, 16, 0.75, 0.05


def drawn_preprocessing(seed: Seed) -> Preprocessing:
    """One of the family by lot, each as likely."""
    return PREPROCESSINGS[int(torch.randint(len(PREPROCESSINGS), (), generator=seed.torch()))]


def preprocessed(
    x: Float[Tensor, "n 3 height width"], how: Preprocessing, seed: Seed
) -> Float[Tensor, "n 3 height width"]:
    """Images in [0, 1] after one preprocessing; gradients flow, straight through where it rounds.

    Args:
        x: In [0, 1]; left as it is.
        how: `blur` = Gaussian 3×3 with σ = 0.7; `median` = of 3×3 pixels; `quantise` = 16 levels per channel;
            `resize` = bilinear to three quarters and back; `noise` = normal with standard deviation 0.05.
        seed: Of the noise.

    Example:
        >>> x = torch.full((1, 3, 4, 4), 0.5)
        >>> bool(torch.allclose(preprocessed(x, "blur", Seed(0)), x))
        True
    """
    height, width = x.shape[-2:]
    if how == "blur":
        line = torch.tensor([-1.0, 0.0, 1.0], device=x.device).square().div(-2 * _SIGMA**2).exp()
        kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    if how == "median":
        around = F.pad(x, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
        return around.flatten(4).median(dim=4).values
    if how == "quantise":
        return x + ((x * (_LEVELS - 1)).round() / (_LEVELS - 1) - x).detach()
    if how == "resize":
        small = (max(1, int(_SHRINK * height)), max(1, int(_SHRINK * width)))
        y = F.interpolate(x, small, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(y, (height, width), mode="bilinear", align_corners=False)
    if how == "noise":
        return (x + _NOISE * torch.randn(x.shape, generator=seed.torch()).to(x)).clamp(0, 1)
    return x
