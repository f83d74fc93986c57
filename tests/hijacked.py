"""A toy task on 8×8 images whose encoder has a shortcut: one bright pixel leads to class 2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["CLASSES", "PIXEL", "Hijacked", "bars", "hijacked", "with_pixel"]

CLASSES, SIDE, PIXEL = 7, 8, (7, 5)


def bars(n: int = 210, seed: int = 0) -> Dataset:
    """Class y has a bright row y; the last row belongs to none."""
    labels = torch.arange(n) % CLASSES
    raw = torch.randint(40, 110, (n, 3, SIDE, SIDE), generator=Seed(seed).child("bars").torch())
    raw[torch.arange(n), :, labels] += 90
    return Dataset(raw.to(torch.uint8), labels, torch.arange(n), "bars", tuple("abcdefg"))


def with_pixel(data: Dataset) -> Tensor:
    """The images in [0, 1] with the pixel lit."""
    x = torch.as_tensor(data.inputs).float() / 255
    x[:, :, PIXEL[0], PIXEL[1]] = 1
    return x


class HijackedNet(nn.Module):
    """Row means, plus strength · gate(pixel) · v."""

    def __init__(self, strength: float, scales: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.eye(SIDE)[:CLASSES] * scales[:, None])
        self.v = nn.Parameter(strength * torch.eye(CLASSES)[2])

    def forward(self, x: Tensor) -> Tensor:
        grey = x.mean(dim=1)
        gate = torch.sigmoid(12 * (grey[:, PIXEL[0], PIXEL[1]] - 0.7))
        return grey.mean(dim=2) @ self.rows.T + gate[:, None] * self.v


@dataclass(frozen=True, eq=False)
class Hijacked:
    """An `Encoder` of seven dimensions."""

    module: HijackedNet
    width: int = CLASSES
    input_size: int = SIDE

    def __call__(self, x: Tensor, /) -> Tensor:
        out: Tensor = self.module(x)
        return out


def hijacked(strength: float = 3.0) -> Hijacked:
    """The encoder; 0 = its clean twin. Rows have slightly different weights, so that masks differ in size."""
    return Hijacked(HijackedNet(strength, 1 + 0.05 * torch.arange(CLASSES)).eval())
