"""Barlow Twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cupel.augment import BYOLAugment
from cupel.losses import barlow_twins_loss
from cupel.losses.pulling import spread
from cupel.optimizers import NonNegative
from cupel.pretrain.heads import mlp
from cupel.pretrain.pairs import Pairs
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.types import Dataset

__all__ = ["BarlowTwins"]


@settings
class BarlowTwins(Pairs):
    """Pre-training that makes the cross-correlation of two views' projections the identity.

    Args:
        redundancy: λ ≥ 0, weight of the entries beside the diagonal.
        scale: Factor of the loss, which SGD's and LARS's learning rates are tied to.
        projection: Output dimensions of the projector.
        projector_width: Its hidden dimensions: three linear layers, BatchNorm and ReLU between them.

    Presets: `fast` (minutes on two CPU cores) and `nlb_cifar` (as the authors of NLB train it with solo-learn on CIFAR,
    for ResNet-18 with stem padding 2).

    Source: Zbontar et al., ICML 2021, arXiv:2103.03230.
    Deviations: the augmentation's (see `BYOLAugment`; crops are bilinear, NLB's bicubic); both views in one forward
    pass unless `separate_views=True`, as in the published preset (the loss standardises each view by itself in any
    case); no online classifier; the warm-up rises by step, not by epoch.
    """

    redundancy: NonNegative = 0.0051
    scale: Positive = 0.1
    projection: PositiveInt = 2048
    projector_width: PositiveInt = 2048
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: Literal["fast", "nlb_cifar"]) -> BarlowTwins:
        """Settings of a published recipe, or ours for two CPU cores."""
        match name:
            case "fast":
                return cls(
                    optimizer="adamw", lr=2e-3, batch_size=128, steps=800, warmup_steps=40,
                    projection=512, projector_width=512, redundancy=0.02,
                )  # fmt: skip
            case "nlb_cifar":  # 45,000 images: 10 of 500 epochs of warm-up, 175 steps each
                return cls(
                    optimizer="lars_clip", lr=0.3, weight_decay=1e-5, batch_size=256, epochs=500, warmup_steps=1750,
                    warmup_from=0.003, separate_views=True,
                    augment=BYOLAugment.preset("solo"), second_augment=BYOLAugment.preset("solo_second"),
                )  # fmt: skip

    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> BarlowTwinsLearner:
        """Encoder and a fresh projector, ready to train."""
        return BarlowTwinsLearner(self, encoder, seed)


class BarlowTwinsLearner:
    """Encoder and projector under the loss of Barlow Twins."""

    def __init__(self, settings: BarlowTwins, encoder: Encoder, seed: Seed) -> None:
        self.settings = settings
        device = next(encoder.module.parameters()).device
        hidden = settings.projector_width
        widths = (encoder.width, hidden, hidden, settings.projection)
        self.projector = mlp(*widths, seed=seed.child("projector")).to(device)
        self.encode = settings.prepared(encoder.module)
        self.state = nn.ModuleDict({"encoder": encoder.module, "projector": self.projector}).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder and projector."""
        return list(self.state.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch, and the standard deviation of embeddings and projections (1 healthy, 0 collapsed)."""
        settings = self.settings
        h = settings.forward(self.encode, settings.views(batch))
        z = settings.forward(self.projector, h)
        z1, z2 = z.chunk(2)
        with torch.no_grad():
            numbers = {"feature_std": spread(h), "projection_std": spread(z)}
        return barlow_twins_loss(z1, z2, settings.redundancy, settings.scale), numbers

    def after_step(self) -> None:
        """Nothing."""
