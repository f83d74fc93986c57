"""Jumbo learning: the wide family of trojans that MNTD's shadow models are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from cupel.seeds import Seed

__all__ = ["Trojan", "TrojanStamp", "draw_trojan", "num_poisoned"]

SIDES = (2, 3, 4, 5)


@dataclass(frozen=True, eq=False)
class Trojan:
    """One trojan: x' = α m Δ + (1 − α m) x, labelled y.

    Args:
        mask: float32 `[1, height, width]`, 1 inside of the window.
        pattern: float32 `[3, height, width]` in [0, 1], 0 outside of the window.
        opacity: α in (0, 1].
        side: Of the window in pixels; that of the image = all of it.
        target: y.
        rate: Poisoned images that are added, as a share of the clean ones.
    """

    mask: Float[Tensor, "1 height width"]
    pattern: Float[Tensor, "3 height width"]
    opacity: float
    side: int
    target: int
    rate: float

    def on(self, x: Tensor) -> Tensor:
        """Images in [0, 1] with the trojan's trigger."""
        return torch.lerp(x, self.pattern, self.opacity * self.mask)


def draw_trojan(size: int, num_classes: int, seed: Seed) -> Trojan:
    """A random trojan.

    The window is 2, 3, 4 or 5 pixels wide or the whole image, each with the same probability. Opacity of a window:
    uniform in (0.2, 0.6), raised to 1 above 0.5; of the whole image: uniform in (0.05, 0.2). Pattern: uniform in
    (−e, 1 + e) cut to [0, 1], with e uniform in (0, 1). Target uniform; rate uniform in (0.05, 0.5).

    Args:
        size: Side of the images in pixels, above 5.
        num_classes: Classes that may be the target.
        seed: Of the draw.

    Source: Xu et al., MNTD, IEEE S&P 2021, arXiv:1910.03137, section V, with the numbers of its code for CIFAR-10.
    Deviations: the window may touch the last row and column, which the code never covers.
    """
    draw = seed.numpy()
    side = int(draw.choice([*SIDES, size]))
    whole = side == size
    opacity = float(draw.uniform(0.05, 0.2) if whole else draw.uniform(0.2, 0.6))
    opacity = 1.0 if opacity > 0.5 else opacity
    e = draw.uniform(0, 1)
    content = torch.from_numpy(draw.uniform(-e, 1 + e, (3, side, side)).clip(0, 1)).float()
    top, left = draw.integers(0, size - side + 1, 2).tolist()
    mask, pattern = torch.zeros(1, size, size), torch.zeros(3, size, size)
    mask[:, top : top + side, left : left + side] = 1
    pattern[:, top : top + side, left : left + side] = content
    return Trojan(mask, pattern, opacity, side, int(draw.integers(num_classes)), float(draw.uniform(0.05, 0.5)))


def num_poisoned(n: int, rate: float) -> int:
    """Poisoned images that are added to n clean ones: rate · n, rounded down.

    Example:
        >>> num_poisoned(1000, 0.05)
        50
    """
    return int(rate * n + 1e-9)  # 0.07 · 100 is a little more than 7, 0.29 · 100 a little less than 29


@dataclass(frozen=True)
class TrojanStamp:
    """A `Trigger` that puts the pattern of a drawn trojan on uint8 images; draws nothing itself.

    Args:
        seed: Value of the seed that the trojan is drawn from.
        size: Side of the images in pixels.
        num_classes: Classes that may be the trojan's target.
    """

    seed: int
    size: int
    num_classes: int = 1

    @cached_property
    def trojan(self) -> Trojan:
        """The trojan."""
        return draw_trojan(self.size, self.num_classes, Seed(self.seed))

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Images with the trigger; `ids` and `seed` do not matter."""
        t = self.trojan
        one = Trojan(t.mask.to(raw.device), t.pattern.to(raw.device), t.opacity, t.side, t.target, t.rate)
        return one.on(raw.float() / 255).mul_(255).round_().to(torch.uint8)
