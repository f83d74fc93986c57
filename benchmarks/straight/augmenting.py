"""SimCLR's views of a batch made by others, with parameters of its own for every image; float32 in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.straight.images import as_pixels, views

__all__ = ["by_kornia", "by_pillow", "by_v2"]


def by_pillow(raw: Tensor) -> Callable[[], None]:
    """torchvision's first transforms on Pillow images, one by one, in this process."""
    chain, pixels = views(raw.shape[-1], normalise=False), as_pixels(raw)

    def run() -> None:
        torch.stack([chain(Image.fromarray(one)) for one in pixels])

    return run


def by_v2(raw: Tensor) -> Callable[[], None]:
    """torchvision's second transforms on tensors, one by one: on a batch they would draw once for all images."""
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(raw.shape[-1], antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    def run() -> None:
        torch.stack([chain(one) for one in raw])

    return run


def by_kornia(raw: Tensor) -> Callable[[], None]:
    """kornia's batched augmentations."""
    import kornia.augmentation as K

    side = raw.shape[-1]
    chain = torch.nn.Sequential(
        K.RandomResizedCrop((side, side), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
    )

    def run() -> None:
        with torch.no_grad():
            chain(raw.float() / 255)

    return run
