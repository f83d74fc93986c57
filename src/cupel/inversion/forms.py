"""What an inverted trigger may look like: a stamp, a perturbation of every pixel, or one of the colours' spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from cupel.inversion.stamping import SPAN, squash, stamp
from cupel.seeds import Seed

__all__ = ["Form", "Frequency", "Linf", "Stamp", "blend_of", "cosine_basis", "random_start"]


class Form(Protocol):
    """How unbounded variables change images, and how large the change is. Each start has variables of its own."""

    def start(self, num_starts: int, height: int, width: int, seed: Seed) -> Tensor:
        """Random first values, `[starts, …]`."""
        ...

    def apply(
        self, x: Float[Tensor, "starts batch 3 height width"], v: Tensor
    ) -> tuple[Float[Tensor, "starts batch 3 height width"], Float[Tensor, " starts"]]:
        """The changed images, in [0, 1], and the size of each start's change, in [0, 1]."""
        ...

    def picture(
        self, v: Tensor, height: int, width: int
    ) -> tuple[Float[Tensor, "starts height width"], Float[Tensor, "starts 3 height width"]]:
        """Mask and pattern."""
        ...


def random_start(num_starts: int, height: int, width: int, seed: Seed) -> Float[Tensor, "starts 4 height width"]:
    """Variables whose squashed values are uniform in (0, 1): channel 0 the mask's, 1 to 3 the pattern's."""
    starts = []
    for start in range(num_starts):
        u = torch.rand(4, height, width, dtype=torch.float64, generator=seed.child("start", start).torch())
        starts.append(torch.atanh((u.clamp(1e-6, 1 - 1e-6) - 0.5) * SPAN))  # 0 itself would be −∞ in float32
    return torch.stack(starts).float()


@dataclass(frozen=True)
class Stamp:
    """x' = (1 − m) x + m p; the size is the mean of m.

    Source: Feng et al., DECREE, CVPR 2023, arXiv:2303.15180.
    """

    def start(self, num_starts: int, height: int, width: int, seed: Seed) -> Tensor:
        """Mask and pattern uniform in (0, 1)."""
        return random_start(num_starts, height, width, seed)

    def apply(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stamped images, and the mean of each mask."""
        trigger = squash(v)
        return stamp(x, trigger[:, None, :1], trigger[:, None, 1:]), trigger[:, 0].mean(dim=(1, 2))

    def picture(self, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """m and p."""
        trigger = squash(v)
        return trigger[:, 0], trigger[:, 1:]


@dataclass(frozen=True)
class Linf:
    """x' = x + r t with t in [−1, 1] for every pixel; the size is r.

    Args:
        least, most: Bounds of r.

    Source: our choice, for triggers that change every pixel a little.
    """

    least: float = 4 / 255
    most: float = 102 / 255

    def start(self, num_starts: int, height: int, width: int, seed: Seed) -> Tensor:
        """r in the middle of its bounds, t uniform in (−1, 1)."""
        pixels = random_start(num_starts, height, width, seed)[:, 1:].flatten(1)
        return torch.cat([torch.zeros(num_starts, 1), pixels], dim=1)

    def _parts(self, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        r = self.least + (self.most - self.least) * squash(v[:, 0])
        return r, torch.tanh(v[:, 1:]).view(-1, 3, height, width)

    def apply(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Perturbed images and r."""
        r, t = self._parts(v, *x.shape[-2:])
        return (x + (r[:, None, None, None] * t)[:, None]).clamp(0, 1), r

    def picture(self, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The nearest blend: see `blend_of`."""
        r, t = self._parts(v, height, width)
        return blend_of(r[:, None, None, None] * t)


@dataclass(frozen=True)
class Frequency:
    """x' = x + colours of Y = 0 whose Cb and Cr are c in a cosine basis; the size is the root mean square of c.

    The basis is that of square blocks of 32 pixels, repeated over the image, or of the image where it is smaller. The
    constant term is left out: it would only tint the image.

    Source: our choice, for triggers like that of Li et al., CTRL, ICCV 2023, arXiv:2210.07346.
    """

    scale: ClassVar[float] = 0.1
    side: ClassVar[int] = 32

    def start(self, num_starts: int, height: int, width: int, seed: Seed) -> Tensor:
        """Coefficients of mean 0 and standard deviation 0.03."""
        side = min(self.side, height, width)
        draws = [seed.child("start", start).torch() for start in range(num_starts)]
        return torch.stack([0.3 * torch.randn(2, side, side, generator=one) for one in draws])

    def _change(self, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        side = v.shape[-1]
        keep = torch.ones(side, side, device=v.device)
        keep[0, 0] = 0
        c = self.scale * v * keep
        basis = cosine_basis(side).to(v.device)
        blue, red = (basis.T @ c @ basis).unbind(1)
        block = torch.stack([1.402 * red, -0.344136 * blue - 0.714136 * red, 1.772 * blue], dim=1)
        times = (1, 1, math.ceil(height / side), math.ceil(width / side))
        return block.repeat(times)[..., :height, :width], c.square().mean(dim=(1, 2, 3)).sqrt()

    def apply(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Tinted images, and the root mean square of the coefficients, at most 1."""
        change, size = self._change(v, *x.shape[-2:])
        return (x + change[:, None]).clamp(0, 1), size.clamp(max=1)

    def picture(self, v: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The nearest blend: see `blend_of`."""
        return blend_of(self._change(v, height, width)[0])


def cosine_basis(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal cosine transform: row k is the k-th basis vector, so that C Cᵀ = 1.

    Example:
        >>> cosine_basis(2).mul(2**0.5).round().tolist()
        [[1.0, 1.0], [1.0, -1.0]]
    """
    k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = torch.cos(torch.pi * k * (2 * x + 1) / (2 * n)) * (2 / n) ** 0.5
    rows[0] /= 2**0.5
    basis: Tensor = rows.float()
    return basis


def blend_of(
    change: Float[Tensor, "starts 3 height width"],
) -> tuple[Float[Tensor, "starts height width"], Float[Tensor, "starts 3 height width"]]:
    """A mask and a pattern that do to a medium grey image what adding `change` does.

    With m = 2 max|δ|, at most 1, and p = ½ + δ/m: (1 − m) x + m p = x + δ + m (½ − x).
    """
    m = (2 * change.abs().amax(dim=(1, 2, 3))).clamp(1e-6, 1)
    mask = m[:, None, None].expand(-1, *change.shape[-2:]).contiguous()
    return mask, (0.5 + change / m[:, None, None, None]).clamp(0, 1)
