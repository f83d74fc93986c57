"""SimSiam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cupel.losses import simsiam_loss
from cupel.losses.pulling import spread
from cupel.pretrain.heads import mlp
from cupel.pretrain.pairs import Pairs
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import PositiveInt, settings
from cupel.types import Dataset

__all__ = ["SimSiam"]


@settings
class SimSiam(Pairs):
    """Pre-training without negatives and without a copy: predict one view's projection from the other's.

    Args:
        projection: Output dimensions of projector and predictor.
        projector_width: Hidden dimensions of the projector: three linear layers, each with BatchNorm, the last one's
            without scale and shift.
        predictor_width: Hidden dimensions of the predictor, a bottleneck: Linear, BatchNorm, ReLU, Linear.
        steady_predictor: The predictor's learning rate stays at `lr`, without warm-up and schedule.

    Presets: `fast` (minutes on two CPU cores), `solo_cifar` (solo-learn's on CIFAR)
    and `ctrl` (the training settings of CTRL's authors with these heads).

    Source: Chen & He, CVPR 2021, arXiv:2011.10566.
    Deviations: the augmentation's (see `BYOLAugment`; crops are bilinear, solo-learn's bicubic); both views in one
    forward pass unless `separate_views=True`, as in the published presets; residual branches do not start at zero; no
    online classifier; warm-ups rise by step, not by epoch.
    """

    projection: PositiveInt = 2048
    projector_width: PositiveInt = 2048
    predictor_width: PositiveInt = 512
    steady_predictor: bool = True
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: Literal["fast", "solo_cifar", "ctrl"]) -> SimSiam:
        """Settings of a published recipe, or ours for two CPU cores."""
        match name:
            case "fast":
                return cls(
                    optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128, steps=800, warmup_steps=40,
                    projection=512, projector_width=512, predictor_width=128,
                )  # fmt: skip
            case "solo_cifar":  # 50,000 images: 10 of 1000 epochs of warm-up, 195 steps each
                return cls(
                    optimizer="sgd", lr=0.5, weight_decay=1e-5, batch_size=256, epochs=1000, warmup_steps=1950,
                    warmup_from=0.003, separate_views=True,
                )  # fmt: skip
            case "ctrl":  # 10 of 800 epochs of warm-up, 97 steps each
                return cls(
                    optimizer="sgd", lr=0.06, weight_decay=5e-4, batch_size=512, epochs=800, warmup_steps=970,
                    separate_views=True,
                )  # fmt: skip

    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> SimSiamLearner:
        """Encoder and fresh projector and predictor, ready to train."""
        return SimSiamLearner(self, encoder, seed)


class SimSiamLearner:
    """Encoder, projector and predictor that regress on their own projections."""

    def __init__(self, settings: SimSiam, encoder: Encoder, seed: Seed) -> None:
        self.settings = settings
        device = next(encoder.module.parameters()).device
        hidden, out = settings.projector_width, settings.projection
        widths = (encoder.width, hidden, hidden, out)
        self.projector = mlp(*widths, seed=seed.child("projector"), last_norm=True).to(device)
        self.predictor = mlp(out, settings.predictor_width, out, seed=seed.child("predictor")).to(device)
        self.encode = settings.prepared(encoder.module)
        parts = {"encoder": encoder.module, "projector": self.projector, "predictor": self.predictor}
        self.state = nn.ModuleDict(parts).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder, projector and predictor."""
        return list(self.state.parameters())

    def unscheduled(self) -> list[nn.Parameter]:
        """Weights whose learning rate stays at its peak."""
        return list(self.predictor.parameters()) if self.settings.steady_predictor else []

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """SimSiam's loss, and the standard deviation of embeddings and projections (1 healthy, 0 collapsed)."""
        settings = self.settings
        h = settings.forward(self.encode, settings.views(batch))
        z = settings.forward(self.projector, h)
        p1, p2 = settings.forward(self.predictor, z).chunk(2)
        z1, z2 = z.chunk(2)
        with torch.no_grad():
            numbers = {"feature_std": spread(h), "projection_std": spread(z)}
        return simsiam_loss(p1, p2, z1, z2), numbers

    def after_step(self) -> None:
        """Nothing."""
