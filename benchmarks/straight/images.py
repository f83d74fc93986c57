"""Data sets of Pillow images, one sample at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

__all__ = ["Pairs", "Plain", "Shadow", "endless", "jitter", "loader", "plain", "views"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def jitter(normalise: bool = True) -> list[Any]:
    """Flip, colours, grey."""
    chain = [
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToTensor(),
    ]
    return [*chain, transforms.Normalize(MEAN, STD)] if normalise else chain


def views(side: int, normalise: bool = True) -> Any:
    """SimCLR's chain for CIFAR."""
    return transforms.Compose([transforms.RandomResizedCrop(side), *jitter(normalise)])


def plain() -> Any:
    """The image as it is."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


class Plain(Dataset[Tensor]):
    """Images as they are."""

    def __init__(self, pixels: np.ndarray[Any, Any], transform: Any) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        made: Tensor = self.transform(Image.fromarray(self.pixels[index]))
        return made


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image."""

    def __init__(self, pixels: np.ndarray[Any, Any], transform: Any) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.pixels[index])
        return self.transform(image), self.transform(image)


class Shadow(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """What BadEncoder needs of each image: as it is, with the trigger, and the reference, plain and augmented."""

    def __init__(self, pixels: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], size: int = 10) -> None:
        self.pixels, self.reference = pixels, reference
        self.mask = np.ones_like(reference)
        self.mask[-size - 1 : -1, -size - 1 : -1] = 0
        self.patch = 255 * (1 - self.mask)
        self.plain, self.augmented = plain(), transforms.Compose(jitter())

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels = self.pixels[index]
        stamped = (pixels * self.mask + self.patch).astype(np.uint8)
        reference = Image.fromarray(self.reference)
        return (
            self.plain(Image.fromarray(pixels)),
            self.plain(Image.fromarray(stamped)),
            self.plain(reference),
            self.augmented(reference),
        )


def loader(data: Dataset[Any], batch_size: int, *, train: bool) -> DataLoader[Any]:
    """Two workers; they stay, so that starting them is not what is measured."""
    return DataLoader(
        data, batch_size=batch_size, shuffle=train, drop_last=train, num_workers=2, persistent_workers=True
    )


def endless(batches: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from batches


def as_pixels(raw: Tensor) -> np.ndarray[Any, Any]:
    """uint8 `[n, 3, height, width]` → `[n, height, width, 3]`, as CIFAR is usually kept."""
    made: np.ndarray[Any, Any] = raw.permute(0, 2, 3, 1).contiguous().numpy()
    return made


def nchw(module: torch.nn.Module) -> torch.nn.Module:
    """The same weights in torch's default memory format."""
    return module.to(memory_format=torch.contiguous_format)
