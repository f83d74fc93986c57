"""What objectives share whose two views may come from two pipelines, with blur and solarisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cupel.augment.byol import BYOLAugment
from cupel.optimizers import NonNegative
from cupel.pretrain.views import TwoViews
from cupel.protocols import Batch
from cupel.settings import settings

__all__ = ["Pairs"]


@settings
class Pairs(TwoViews):
    """Settings of the objectives that followed SimCLR.

    Args:
        augment: How the first views are made.
        second_augment: How the second views are made; None = as the first.
        warmup_from: Learning rate that the warm-up starts from.
    """

    augment: BYOLAugment = BYOLAugment()
    second_augment: BYOLAugment | None = None
    warmup_from: NonNegative = 0.0

    def views(self, batch: Batch) -> Float[Tensor, "two_b 3 h w"]:
        """First views of all images of the batch, then second views; drawn from `batch.seed`."""
        if self.second_augment is None:
            return super().views(batch)
        made = []
        for name, augment in (("first", self.augment), ("second", self.second_augment)):
            make = augment if self.augmentation == "fused" else augment.exact
            made.append(make(batch.inputs, batch.seed.child(name).torch(batch.inputs.device)))
        return torch.cat(made)

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step `step` of `total`; the warm-up is linear from `warmup_from` to `lr`."""
        if step < self.warmup_steps:
            return self.warmup_from + (self.lr - self.warmup_from) * (step + 1) / self.warmup_steps
        return super().lr_at(step, total)
