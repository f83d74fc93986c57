"""What objectives with two views of each image share: how views are made, and how networks see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.optimizers import Recipe
from cupel.pretrain.compiling import Compiled
from cupel.protocols import Batch
from cupel.settings import settings
from cupel.types import Need

__all__ = ["TwoViews"]

Network = Callable[[Tensor], Tensor]


@settings
class TwoViews(Recipe):
    """Settings of every objective that compares two views of an image.

    Args:
        augment: How views are made.
        augmentation: `fused` = for the whole batch at once; `exact` = the published chain, image by image on the CPU
            (see `SimCLRAugment.exact`), at least ten times slower.
        separate_views: One forward pass per view, as published, so BatchNorm sees `batch_size` images at a time; else
            both views pass together and it sees twice as many, which is faster.
        compile: `torch.compile` the encoder; where that fails it is said in one line, and training goes on without.
    """

    augment: SimCLRAugment = SimCLRAugment()
    augmentation: Literal["fused", "exact"] = "fused"
    separate_views: bool = False
    compile: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset()

    def views(self, batch: Batch) -> Float[Tensor, "two_b 3 h w"]:
        """First views of all images of the batch, then second views; drawn from `batch.seed`."""
        make = self.augment if self.augmentation == "fused" else self.augment.exact
        return make(torch.cat([batch.inputs, batch.inputs]), batch.seed.torch(batch.inputs.device))

    def forward(self, network: Network, x: Float[Tensor, "two_b ..."]) -> Float[Tensor, "two_b ..."]:
        """`network` on first and second views, together or one after the other.

        Args:
            network: Anything that maps a batch; one with BatchNorm gives other results for `separate_views`.
            x: Views, or what another network made of them; first views in the first half.
        """
        if not self.separate_views:
            return network(x)
        return torch.cat([network(one) for one in x.chunk(2)])

    def prepared(self, network: nn.Module) -> Network:
        """The network as it is called in the training step: compiled where that is wanted. It shares all weights."""
        return Compiled(network) if self.compile else network
