"""SimCLR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.losses import nt_xent
from cupel.pretrain.views import TwoViews
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.types import Dataset

__all__ = ["SimCLR"]


@settings
class SimCLR(TwoViews):
    """Contrastive pre-training: two views of an image attract, all other views of the batch repel.

    Args:
        temperature: τ > 0.
        projection: Output dimensions of the projector.
        projector: `badencoder` = Linear (no bias), BatchNorm, ReLU, Linear; `plain` = Linear, ReLU, Linear.
        projector_width: Hidden dimensions of the projector; None = the encoder's width.

    Presets: `fast` (minutes on two CPU cores), and the CIFAR recipes of the authors of BadEncoder (`badencoder`),
    SimCLR (`google_cifar`), NLB (`nlb_cifar`) and CTRL (`ctrl`).

    Source: Chen et al., ICML 2020, arXiv:2002.05709.
    Deviations: the augmentation's (see `SimCLRAugment`), unless `augmentation="exact"`; both views in one forward pass,
    so BatchNorm sees 2·batch images, unless `separate_views=True`; the mean of the loss over both views where the
    authors' code sums two means. `nlb_cifar` warms up from 0 instead of 0.003, and its crops are bilinear, not bicubic.
    """

    temperature: Positive = 0.5
    projection: PositiveInt = 128
    projector: Literal["badencoder", "plain"] = "badencoder"
    projector_width: Annotated[int, Field(gt=0)] | None = None
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: Literal["fast", "badencoder", "google_cifar", "nlb_cifar", "ctrl"]) -> SimCLR:
        """Settings of a published recipe, or ours for two CPU cores."""
        match name:
            case "fast":
                return cls(optimizer="adamw", lr=2e-3, batch_size=128, steps=600, temperature=0.2)
            case "badencoder":
                return cls(
                    optimizer="adam", lr=1e-3, weight_decay=1e-6, batch_size=256, epochs=1000, schedule="constant"
                )
            case "google_cifar":  # lr = 1.0 · batch / 256; 10 of 1000 epochs of warm-up, 97 steps each
                return cls(optimizer="lars", lr=2.0, weight_decay=1e-4, batch_size=512, epochs=1000, warmup_steps=970)
            case "nlb_cifar":  # 45,000 images: 10 of 500 epochs of warm-up, 175 steps each
                return cls(
                    optimizer="lars_clip", lr=0.4, weight_decay=1e-5, batch_size=256, epochs=500, warmup_steps=1750,
                    temperature=0.2, projector="plain", projector_width=2048, projection=256, separate_views=True,
                    augment=SimCLRAugment(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
                )  # fmt: skip
            case "ctrl":
                return cls(
                    optimizer="sgd", lr=0.06, weight_decay=5e-4, batch_size=512, epochs=800, warmup_steps=970,
                    projector="plain",
                )  # fmt: skip

    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> SimCLRLearner:
        """Encoder and a fresh projector, ready to train."""
        return SimCLRLearner(self, encoder, seed)


class SimCLRLearner:
    """Encoder and projector under NT-Xent."""

    def __init__(self, settings: SimCLR, encoder: Encoder, seed: Seed) -> None:
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed.child("projector").value)
            projector = _projector(settings, encoder.width)
        device = next(encoder.module.parameters()).device
        self.projector = projector.to(device)
        self.encode = settings.prepared(encoder.module)
        self.state = nn.ModuleDict({"encoder": encoder.module, "projector": self.projector}).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder and projector."""
        return list(self.state.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """NT-Xent of one batch, and the embeddings' standard deviation (about 1 healthy, towards 0 collapsed)."""
        settings = self.settings
        h = settings.forward(self.encode, settings.views(batch))
        z1, z2 = settings.forward(self.projector, h).chunk(2)
        with torch.no_grad():
            spread = F.normalize(h.float(), dim=1).std(dim=0).mean() * h.shape[1] ** 0.5
        return nt_xent(z1, z2, settings.temperature), {"feature_std": spread}

    def after_step(self) -> None:
        """Nothing."""


def _projector(settings: SimCLR, width: int) -> nn.Module:
    hidden = settings.projector_width or width
    if settings.projector == "plain":
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, settings.projection))
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, settings.projection),
    )
