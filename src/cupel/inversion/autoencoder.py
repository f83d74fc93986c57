"""A small autoencoder of images: what its decoder gives looks like the images that it was trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cupel.seeds import Seed

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """One convolution down to half of each side, two back up; images in [0, 1] → images in [0, 1].

    Args:
        width: Channels of the code; at least 1.
        seed: Of the first weights.
    """

    def __init__(self, width: int, seed: Seed) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed.value)
            self.code = nn.Conv2d(3, width, 4, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
            self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 height width"]:
        """Reconstructions, in the size of `x`."""
        z = F.gelu(self.code(x * 2 - 1))
        made: Tensor = self.out(F.gelu(self.up(z, output_size=x.shape[-2:])))
        return (2 * made).sigmoid()
