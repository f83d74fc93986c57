"""MoCo v2 and v2+."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel.augment import BYOLAugment
from cupel.errors import SettingsError
from cupel.losses import queue_nce
from cupel.losses.pulling import spread
from cupel.pretrain.heads import mlp
from cupel.pretrain.momentum import KeyQueue, MomentumCopy
from cupel.pretrain.pairs import Pairs
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.types import Dataset

__all__ = ["MoCo"]


@settings
class MoCo(Pairs):
    """Contrastive pre-training against a queue of keys, which a slowly following copy of the network makes.

    Args:
        temperature: τ > 0.
        queue_size: K, keys in each queue; a multiple of `batch_size`.
        symmetric: v2+: each view is a query once, each with a queue of its own. Otherwise v2: the first view is the
            query, the second the key, and there is one queue.
        ema_start, ema_end: The copy's momentum at the first and at the last step; a half cosine between them.
        projection: Output dimensions of the projector.
        projector_width: Hidden dimensions of the projector; None = the encoder's width.

    Presets: `fast` (minutes on two CPU cores), `nlb_cifar` (v2+ as the authors of NLB train it with solo-learn on
    CIFAR, for ResNet-18 with stem padding 2) and `sslbkd` (v2 as the authors of SSL-Backdoor and CorruptEncoder train
    it on 224-pixel images).

    Raises:
        SettingsError: `queue_size` is no multiple of `batch_size`.

    Source: He et al., CVPR 2020, arXiv:1911.05722; Chen et al., arXiv:2003.04297; v2+ is solo-learn's.
    Deviations: the augmentation's (see `BYOLAugment`; crops are bilinear, NLB's bicubic); both views in one forward
    pass unless `separate_views=True`, as in the published presets; no shuffling of batches, which matters across
    devices only; no online classifier; the warm-up rises by step, not by epoch.
    """

    temperature: Positive = 0.2
    queue_size: PositiveInt = 4096
    symmetric: bool = True
    ema_start: Fraction = 0.99
    ema_end: Fraction = 0.999
    projection: PositiveInt = 128
    projector_width: Annotated[int, Field(gt=0)] | None = None
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.queue_size % self.batch_size:
            what = f"{self.queue_size} is no multiple of batch_size = {self.batch_size}"
            raise SettingsError("MoCo.queue_size", what, f"e.g. {self.batch_size * 32}")

    @classmethod
    def preset(cls, name: Literal["fast", "nlb_cifar", "sslbkd"]) -> MoCo:
        """Settings of a published recipe, or ours for two CPU cores."""
        match name:
            case "fast":
                return cls(optimizer="adamw", lr=2e-3, batch_size=128, steps=800, warmup_steps=40)
            case "nlb_cifar":  # 45,000 images: 10 of 500 epochs of warm-up, 175 steps each
                return cls(
                    optimizer="sgd", lr=0.3, weight_decay=1e-5, batch_size=256, epochs=500, warmup_steps=1750,
                    warmup_from=0.003, queue_size=32_768, projector_width=2048, separate_views=True,
                )  # fmt: skip
            case "sslbkd":
                return cls(
                    optimizer="sgd", lr=0.06, weight_decay=1e-4, batch_size=256, epochs=200, queue_size=65_536,
                    symmetric=False, ema_start=0.999, ema_end=0.999, augment=BYOLAugment.preset("mocov2"),
                    separate_views=True,
                )  # fmt: skip

    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> MoCoLearner:
        """Encoder, a fresh projector, the copy of both, and queues of random keys, ready to train."""
        return MoCoLearner(self, encoder, self.total_steps(len(data), data.name), seed)


class MoCoLearner:
    """Encoder and projector under InfoNCE with queues."""

    def __init__(self, settings: MoCo, encoder: Encoder, total: int, seed: Seed) -> None:
        self.settings = settings
        device = next(encoder.module.parameters()).device
        hidden = settings.projector_width or encoder.width
        projector = mlp(encoder.width, hidden, settings.projection, seed=seed.child("projector"), norm=False)
        self.online = nn.ModuleDict({"encoder": encoder.module, "projector": projector.to(device)})
        self.momentum = MomentumCopy(
            *self.online.values(), start=settings.ema_start, end=settings.ema_end, total=total
        ).to(device)
        queues = [
            KeyQueue(settings.queue_size, settings.projection, seed.child("queue", view)).to(device)
            for view in range(1 + settings.symmetric)
        ]
        self.queues = nn.ModuleList(queues)
        self.encode = settings.prepared(encoder.module)
        self.fresh: list[Tensor] = []
        parts = {"online": self.online, "momentum": self.momentum, "queues": self.queues}
        self.state = nn.ModuleDict(parts).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder and projector; the copy follows without an optimiser."""
        return list(self.online.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """InfoNCE of one batch, and the standard deviation of embeddings and projections (1 healthy, 0 collapsed)."""
        settings, keys = self.settings, [queue.keys for queue in self._rings()]
        x = settings.views(batch)
        if settings.symmetric:
            h = settings.forward(self.encode, x)
            q = settings.forward(self.online["projector"], h)
            k = settings.forward(self.momentum, x)
            (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
            first, second = (queue_nce(*one, settings.temperature) for one in ((q1, k2, keys[1]), (q2, k1, keys[0])))
            loss, self.fresh = (first + second) / 2, [k1, k2]
        else:
            x1, x2 = x.chunk(2)
            h = self.encode(x1)
            q, k = self.online["projector"](h), self.momentum(x2)
            loss, self.fresh = queue_nce(q, k, keys[0], settings.temperature), [k]
        with torch.no_grad():
            return loss, {"feature_std": spread(h), "projection_std": spread(q)}

    def after_step(self) -> None:
        """The copy follows, and this batch's keys enter the queues, which the gradient no longer needs."""
        self.momentum.follow(*self.online.values())
        for queue, keys in zip(self._rings(), self.fresh, strict=True):
            queue.push(keys)
        self.fresh = []

    def _rings(self) -> list[KeyQueue]:
        return [one for one in self.queues if isinstance(one, KeyQueue)]
