"""BYOL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cupel.augment import BYOLAugment
from cupel.losses import byol_loss
from cupel.losses.pulling import spread
from cupel.pretrain.heads import mlp
from cupel.pretrain.momentum import MomentumCopy
from cupel.pretrain.pairs import Pairs
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Fraction, PositiveInt, settings
from cupel.types import Dataset

__all__ = ["BYOL"]


@settings
class BYOL(Pairs):
    """Pre-training without negatives: from one view predict what a slowly following copy makes of the other.

    Args:
        ema_start, ema_end: The copy's momentum at the first and at the last step; a half cosine between them.
        projection: Output dimensions of projector and predictor.
        projector_width, predictor_width: Their hidden dimensions; each is Linear, BatchNorm, ReLU, Linear.

    Presets: `fast` (minutes on two CPU cores), `nlb_cifar` (as the authors of NLB train it with solo-learn on CIFAR,
    for ResNet-18 with stem padding 2), `sslbkd` (as the authors of SSL-Backdoor do) and `ctrl` (those of CTRL).

    Source: Grill et al., NeurIPS 2020, arXiv:2006.07733.
    Deviations: the augmentation's (see `BYOLAugment`; crops are bilinear, NLB's bicubic); both views in one forward
    pass unless `separate_views=True`, as in the published presets; the loss is the sum over both directions, as in the
    paper and in solo-learn. CTRL's code takes a quarter of it, so `ctrl` has a quarter of its learning rate and four
    times its weight decay, which gives the same steps; its copy starts equal to the network, not from weights of its
    own. `sslbkd` has a cosine schedule. No online classifier; warm-ups rise by step, not by epoch.
    """

    ema_start: Fraction = 0.99
    ema_end: Fraction = 1.0
    projection: PositiveInt = 256
    projector_width: PositiveInt = 4096
    predictor_width: PositiveInt = 4096
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: Literal["fast", "nlb_cifar", "sslbkd", "ctrl"]) -> BYOL:
        """Settings of a published recipe, or ours for two CPU cores."""
        match name:
            case "fast":
                return cls(
                    optimizer="adamw", lr=2e-3, batch_size=128, steps=800, warmup_steps=40,
                    projection=128, projector_width=512, predictor_width=512,
                )  # fmt: skip
            case "nlb_cifar":  # 45,000 images: 10 of 500 epochs of warm-up, 175 steps each
                return cls(
                    optimizer="lars_clip", lr=1.0, weight_decay=1e-5, batch_size=256, epochs=500, warmup_steps=1750,
                    warmup_from=0.003, separate_views=True,
                    augment=BYOLAugment.preset("solo"), second_augment=BYOLAugment.preset("solo_second"),
                )  # fmt: skip
            case "sslbkd":
                return cls(
                    optimizer="adam", lr=2e-3, weight_decay=1e-6, batch_size=512, epochs=200, warmup_steps=500,
                    projection=128, projector_width=1024, predictor_width=1024, separate_views=True,
                    augment=BYOLAugment.preset("sslbkd_byol"),
                )  # fmt: skip
            case "ctrl":  # 50,000 images: 10 of 800 epochs of warm-up, 97 steps each
                return cls(
                    optimizer="sgd", lr=0.06 / 4, weight_decay=4 * 5e-4, batch_size=512, epochs=800, warmup_steps=970,
                    projector_width=2048, predictor_width=2048, separate_views=True, ema_start=0.996, ema_end=0.996,
                )  # fmt: skip

    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> BYOLLearner:
        """Encoder, fresh projector and predictor, and the copy of the first two, ready to train."""
        return BYOLLearner(self, encoder, self.total_steps(len(data), data.name), seed)


class BYOLLearner:
    """Encoder, projector and predictor that regress on the copy's projections."""

    def __init__(self, settings: BYOL, encoder: Encoder, total: int, seed: Seed) -> None:
        self.settings = settings
        device = next(encoder.module.parameters()).device
        out = settings.projection
        projector = mlp(encoder.width, settings.projector_width, out, seed=seed.child("projector"))
        predictor = mlp(out, settings.predictor_width, out, seed=seed.child("predictor"))
        self.online = nn.ModuleDict({"encoder": encoder.module, "projector": projector.to(device)})
        self.predictor = predictor.to(device)
        self.momentum = MomentumCopy(
            *self.online.values(), start=settings.ema_start, end=settings.ema_end, total=total
        ).to(device)
        self.encode = settings.prepared(encoder.module)
        parts = {"online": self.online, "predictor": self.predictor, "momentum": self.momentum}
        self.state = nn.ModuleDict(parts).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder, projector and predictor; the copy follows without an optimiser."""
        return [*self.online.parameters(), *self.predictor.parameters()]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch, and the standard deviation of embeddings and projections (1 healthy, 0 collapsed)."""
        settings = self.settings
        x = settings.views(batch)
        h = settings.forward(self.encode, x)
        z = settings.forward(self.online["projector"], h)
        p1, p2 = settings.forward(self.predictor, z).chunk(2)
        z1, z2 = settings.forward(self.momentum, x).chunk(2)
        with torch.no_grad():
            numbers = {"feature_std": spread(h), "projection_std": spread(z)}
        return byol_loss(p1, p2, z1, z2), numbers

    def after_step(self) -> None:
        """The copy follows."""
        self.momentum.follow(*self.online.values())
