"""Supervised pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.augment import ShiftFlip
from cupel.metrics import check_labels
from cupel.optimizers import Recipe
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import settings
from cupel.types import Dataset, Need

__all__ = ["Supervised", "SupervisedLearner"]


@settings
class Supervised(Recipe):
    """Pre-training with labels: cross entropy of a linear head on the embedding; the head is thrown away.

    Args:
        augment: How a training image is shown; None = as it is.

    Presets: `fast` (minutes on two CPU cores) and `badnets` (ResNet-18 on CIFAR-10 as the authors of FST train the
    classifiers that they attack).

    Source: the usual recipe of supervised backdoors, e.g. Gu, Dolan-Gavitt, Garg, BadNets, arXiv:1708.06733; settings
    of Min et al., FST, NeurIPS 2023, arXiv:2310.01875.
    Deviations: pixels that the padding adds are black before normalisation, as torchvision's are.
    """

    augment: ShiftFlip | None = ShiftFlip()
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: Literal["fast", "badnets"]) -> Supervised:
        """Settings of a published recipe, or ours for two CPU cores."""
        match name:
            case "fast":
                return cls(optimizer="adamw", lr=2e-3, weight_decay=5e-4, batch_size=128, steps=800)
            case "badnets":
                return cls(optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128, epochs=100)

    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> SupervisedLearner:
        """Encoder and a fresh head, ready to train.

        Raises:
            DataError: an image has no label.
            UsageError: a label outside of the classes.
        """
        check_labels(data.labels, data.num_classes, data.name)
        return SupervisedLearner(self, encoder, data.labels, data.num_classes, seed)


class SupervisedLearner:
    """Encoder and head under cross entropy."""

    def __init__(self, settings: Supervised, encoder: Encoder, labels: Tensor, num_classes: int, seed: Seed) -> None:
        self.settings, self.encode = settings, encoder.module
        device = next(encoder.module.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed.child("head").value)
            self.head = nn.Linear(encoder.width, num_classes).to(device)
        self.labels = labels.to(device)
        self.state = nn.ModuleDict({"encoder": encoder.module, "head": self.head}).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder and head."""
        return list(self.state.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean cross entropy of one batch, and the share that is classified rightly."""
        augment, x = self.settings.augment, batch.inputs
        if augment is None:
            x = x.float().div_(255).contiguous(memory_format=torch.channels_last)
        else:
            x = augment(x, batch.seed.torch(x.device))
        y = self.labels[batch.rows.to(self.labels.device)]
        logits = self.head(self.encode(x)).float()
        return F.cross_entropy(logits, y), {"accuracy": (logits.detach().argmax(1) == y).float().mean()}

    def after_step(self) -> None:
        """Nothing."""
