"""Small data and encoders for tests."""

from __future__ import annotations

import torch

from cupel.augment import SimCLRAugment
from cupel.encoders import Fast, ImageEncoder
from cupel.pretrain import SimCLR, pretrain_encoder
from cupel.seeds import Seed
from cupel.types import Dataset


def blobs(n: int = 256, size: int = 16, classes: int = 4, seed: int = 0) -> Dataset:
    """Images whose class is the quadrant of a bright blob, on noise; easy to learn and to tell apart."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    pixels = torch.randint(0, 90, (n, 3, size, size), generator=g)
    half = size // 2
    for i, label in enumerate(labels.tolist()):
        top, left = divmod(label % 4, 2)
        y, x = (torch.randint(0, half - 4, (2,), generator=g) + torch.tensor([top * half, left * half])).tolist()
        pixels[i, label % 3, y : y + 5, x : x + 5] += 140
    return Dataset(pixels.clamp(0, 255).to(torch.uint8), labels, torch.arange(n), "blobs", tuple("abcd"[:classes]))


def small_encoder(seed: int = 0, size: int = 16, width: int = 8) -> ImageEncoder:
    """A fresh fast CNN."""
    return Fast(width=width, input_size=size).build(Seed(seed))


def trained_encoder(data: Dataset, steps: int = 60, seed: int = 0, width: int = 8) -> ImageEncoder:
    """A few steps of SimCLR; flips and crops that keep the quadrant."""
    objective = SimCLR(
        steps=steps, batch_size=64, lr=3e-3, temperature=0.2, augment=SimCLRAugment(min_scale=0.8, flip=0.0)
    )
    size = int(data.inputs.shape[-1])
    return pretrain_encoder(objective, Fast(width=width, input_size=size), data.without_labels("pretrain"), Seed(seed))[
        0
    ]
