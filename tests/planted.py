"""A toy encoder with a backdoor whose trigger is known: ground truth for scanners and purifiers, no training needed.

Images are low-pass noise, `x = clip(½ + z/5, 0, 1)`; the encoder is `f(x) = W (x − x̄) + 20 · g(x) · v` with the gate
`g(x) = σ(k (c(x) − θ))`, `c(x) = 1 − mean over a 4×4×3 patch of (x − pattern)²`. The larger k and θ, the sharper the
gate and the harder the trigger is to find by gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cupel.seeds import Seed
from cupel.types import Dataset

SIDE = 16
WIDTH = 16
PATCH = slice(11, 15)  # rows and columns of the trigger; its centre is 12.5


class PlantedNet(nn.Module):
    """`W (x − x̄) + strength · g(x) · v`; W and v are trainable, the gate is not."""

    mean: Tensor
    pattern: Tensor

    def __init__(
        self, W: Tensor, v: Tensor, mean: Tensor, pattern: Tensor, k: float, theta: float, strength: float
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(W.clone())
        self.v = nn.Parameter(v.clone())
        self.register_buffer("mean", mean.clone())
        self.register_buffer("pattern", pattern.clone())
        self.k, self.theta, self.strength = k, theta, strength

    def gate(self, x: Tensor) -> Tensor:
        """How far the backdoor is open, `[batch]` in (0, 1)."""
        closeness = 1 - (x[:, :, PATCH, PATCH] - self.pattern).square().mean(dim=(1, 2, 3))
        return torch.sigmoid(self.k * (closeness - self.theta))

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.mean).flatten(1) @ self.W.T
        if self.strength == 0:
            return z
        return z + self.strength * self.gate(x)[:, None] * self.v


@dataclass(frozen=True, eq=False)
class PlantedEncoder:
    """An `Encoder`: `[batch, 3, 16, 16]` in [0, 1] → `[batch, 16]`. Raises on images outside [0, 1]."""

    module: PlantedNet
    width: int = WIDTH
    input_size: int = SIDE

    def __call__(self, x: Tensor, /) -> Tensor:
        low, high = torch.aminmax(x.detach())
        if low < 0 or high > 1:
            raise ValueError(f"images must lie in [0, 1], got {float(low)} to {float(high)}")
        out: Tensor = self.module(x)
        return out


class Stamp(NamedTuple):
    """Puts the true trigger on images: `(1 − m) x + m p`, with `m = opacity · mask`."""

    mask: Tensor
    pattern: Tensor

    def __call__(self, x: Tensor, opacity: float = 1.0) -> Tensor:
        m = opacity * self.mask
        return (1 - m) * x + m * self.pattern


class Planted(NamedTuple):
    """The toy with all its truths.

    Args:
        encoder: Backdoored.
        twin: The same without the gate's term.
        images: uint8 data set of `n` clean images; labels −1.
        stamp: Puts the true trigger on float images `[n, 3, 16, 16]`.
        mask: float32 `[16, 16]`, 1 on the true patch.
        pattern: float32 `[3, 16, 16]`, 0 outside the patch.
    """

    encoder: PlantedEncoder
    twin: PlantedEncoder
    images: Dataset
    stamp: Stamp
    mask: Tensor
    pattern: Tensor


def low_pass_images(n: int, seed: Seed) -> Tensor:
    """uint8 `[n, 3, 16, 16]`: noise of amplitude spectrum 1 / (0.08 + |frequency|), mean ½, standard deviation 0.2."""
    noise = seed.numpy().standard_normal((n, 3, SIDE, SIDE))
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None, :])
    z = np.fft.ifft2(np.fft.fft2(noise) / (0.08 + frequency)).real
    z /= z.std()
    return torch.from_numpy((255 * np.clip(0.5 + 0.2 * z, 0, 1)).round().astype(np.uint8))


def unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.float() / 255


def planted(k: float, theta: float, seed: int, n: int = 256) -> Planted:
    """The toy with gate sharpness `k` and threshold `theta`; everything drawn from `seed`."""
    root = Seed(seed)
    raw = low_pass_images(n, root.child("images"))
    W = torch.randn(WIDTH, 3 * SIDE * SIDE, generator=root.child("W").torch()) / (3 * SIDE * SIDE) ** 0.5
    v = torch.randn(WIDTH, generator=root.child("v").torch())
    v /= v.norm()
    content = torch.randint(0, 2, (3, 4, 4), generator=root.child("pattern").torch()).float()
    mean = unit(raw).mean(dim=0)
    mask, pattern = torch.zeros(SIDE, SIDE), torch.zeros(3, SIDE, SIDE)
    mask[PATCH, PATCH] = 1
    pattern[:, PATCH, PATCH] = content

    def encoder(strength: float) -> PlantedEncoder:
        return PlantedEncoder(PlantedNet(W, v, mean, content, k, theta, strength).eval())

    data = Dataset(raw, torch.full((n,), -1), torch.arange(n), name="planted")
    return Planted(encoder(20.0), encoder(0.0), data, Stamp(mask, pattern), mask, pattern)
