"""A classifier under training: encoder and linear head under cross entropy; most purifiers with labels build on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cupel.inference import FrozenProbe, device_of
from cupel.protocols import Batch
from cupel.purify.batch_norm import set_batch_norm

if TYPE_CHECKING:
    from cupel.purify.labelled import LabelledPurifier

__all__ = ["ClassifierLearner", "Joined", "share_right"]


class Joined(nn.Module):
    """An encoder's network and a head as one module: images in [0, 1] → logits in float32."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x)).float()
        return logits


class ClassifierLearner:
    """Encoder and head under cross entropy.

    Args:
        settings: Of the method.
        model: Trained in place.
        labels: Of the data set, by row.
        backbone, head: Which parts are trained.
    """

    def __init__(
        self,
        settings: LabelledPurifier,
        model: FrozenProbe,
        labels: Tensor,
        *,
        backbone: bool = True,
        head: bool = True,
    ) -> None:
        self.settings, self.model = settings, model
        self.classifier = Joined(model.encoder.module, model.head)
        self.state: nn.Module = self.classifier
        self.labels = labels.to(device_of(self.classifier))
        model.encoder.module.train().requires_grad_(backbone)
        model.head.train().requires_grad_(head)
        set_batch_norm(model.encoder.module, settings.batch_norm, trained=backbone)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [one for one in self.state.parameters() if one.requires_grad]

    def shown(self, batch: Batch) -> Float[Tensor, "n 3 height width"]:
        """The images of the batch as the classifier gets them, in [0, 1]."""
        if self.settings.augment is None:
            return batch.inputs.float().div_(255).contiguous(memory_format=torch.channels_last)
        return self.settings.augment(batch.inputs, batch.seed.child("augment").torch(batch.inputs.device))

    def wanted(self, batch: Batch) -> Int[Tensor, " n"]:
        """Their labels."""
        return self.labels[batch.rows.to(self.labels.device)]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean cross entropy, and the share of the batch that is classified rightly."""
        logits, y = self.classifier(self.shown(batch)), self.wanted(batch)
        return F.cross_entropy(logits, y), {"accuracy": share_right(logits, y)}

    def after_step(self) -> None:
        """Nothing."""


def share_right(logits: Tensor, y: Tensor) -> Tensor:
    """Share of rows that are classified rightly."""
    return (logits.detach().argmax(1) == y).float().mean()
