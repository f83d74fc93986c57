"""A network each of whose cells sees a small square of the image, as BagNet's do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cupel.seeds import Seed

__all__ = ["LocalEvidence", "LocalNet", "local_net"]

_LEAK = 0.1


class _Block(nn.Module):
    """Convolution k×k, then 1×1, and a shortcut of 1×1; BatchNorm behind each."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))
        return out


class LocalNet(nn.Module):
    """Images in [0, 1] → feature maps `[n, width, height, width of the map]`; nothing in it looks further than its
    kernels."""

    def __init__(self, channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        sizes = zip([3, *channels], channels, kernels, strides, strict=False)
        self.blocks = nn.Sequential(*(_Block(*one) for one in sizes))

    def forward(self, x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n channels rows columns"]:
        out: Tensor = self.blocks((x - 0.5) / 0.25)
        return out


class LocalEvidence(nn.Module):
    """A network of local features with a linear head on each cell: evidence per cell and class, at least 0.

    In train mode a tenth of what is below 0 is let through: masks push evidence down, and what is 0 everywhere would
    never come back.
    """

    def __init__(self, network: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n cells classes"]:
        cells = self.network(x).flatten(2).transpose(1, 2)
        return F.leaky_relu(self.head(cells), _LEAK if self.training else 0.0)


def local_net(width: int, outputs: int, kernels: Sequence[int], strides: Sequence[int], seed: Seed) -> LocalNet:
    """A freshly initialised network; the global generator is left as it was.

    Args:
        width: Channels of the first block; they double at each stride above 1.
        outputs: Channels of the last.
        kernels: Side of the convolution of each block, odd.
        strides: Of each block.
        seed: Of the initialisation.
    """
    channels, now = [], width
    for stride in strides:
        now *= 2 if stride > 1 else 1
        channels.append(now)
    channels[-1] = outputs
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed.value)
        return LocalNet(channels, kernels, strides).to(memory_format=torch.channels_last)
