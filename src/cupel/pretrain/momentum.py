"""What MoCo and BYOL remember between steps: a slowly following copy of the network, and a queue of keys."""

from __future__ import annotations

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cupel.seeds import Seed

__all__ = ["KeyQueue", "MomentumCopy"]


class MomentumCopy(nn.Module):
    """A copy ξ of networks θ that follows them: ξ ← m ξ + (1 − m) θ after every step.

    m(k) = m_end − (m_end − m_start) · (cos(π k / total) + 1) / 2 in step k, so m(0) = m_start and m(total) = m_end.
    Weights alone are averaged; BatchNorm's statistics are those of the copy's own passes in train mode. The step is
    counted in a buffer, so a resumed run goes on where it stopped, and no step waits for the device.

    Args:
        networks: θ, applied one after the other; they are copied and stay as they are.
        start, end: m_start and m_end in [0, 1]; 1 = stands still.
        total: Steps of the whole training.

    Source: He et al., MoCo, CVPR 2020, eq. 2; the schedule is that of Grill et al., BYOL, NeurIPS 2020, section 3.2.
    """

    step: Tensor

    def __init__(self, *networks: nn.Module, start: float, end: float, total: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(nn.Sequential(*networks)).requires_grad_(False)
        self.start, self.end, self.total = start, end, max(1, total)
        device = next(self.network.parameters()).device
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the copy makes of `x`; no gradient."""
        out: Tensor = self.network(x)
        return out

    def rate(self) -> Float[Tensor, ""]:
        """1 − m of this step; computed as such, for m itself is often too near to 1."""
        turn = torch.cos(self.step * (math.pi / self.total))
        return (1 - self.end) + (self.end - self.start) * (turn + 1) / 2

    @torch.no_grad()
    def follow(self, *networks: nn.Module) -> None:
        """Go one step towards `networks`, and count it."""
        rate = self.rate()
        theirs = itertools.chain.from_iterable(one.parameters() for one in networks)
        for mine, new in zip(self.network.parameters(), theirs, strict=True):
            mine.lerp_(new, rate)
        self.step += 1


class KeyQueue(nn.Module):
    """A ring of unit vectors: the newest batch takes the place of the oldest.

    Args:
        size: K, a multiple of the batch size.
        dim: Dimensions of a key.
        seed: Of the random unit vectors that fill it at first.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, seed: Seed) -> None:
        super().__init__()
        drawn = torch.randn(size, dim, generator=seed.torch())
        self.register_buffer("keys", F.normalize(drawn, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Float[Tensor, "batch dim"]) -> None:
        """Put new keys of any norm in; the batch must divide the size."""
        n = len(keys)
        rows = self.pointer + torch.arange(n, device=self.keys.device)
        self.keys.index_copy_(0, rows, F.normalize(keys.float(), dim=1))
        self.pointer.add_(n).remainder_(len(self.keys))
