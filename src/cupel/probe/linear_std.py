"""Linear probe of the SSL-Backdoor line of work: standardised unit embeddings, SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from cupel.inference import FrozenProbe, features
from cupel.metrics import check_labels
from cupel.progress import track
from cupel.protocols import Encoder
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.types import Dataset, Need

__all__ = ["LinearStd", "StandardisedLinear"]


class StandardisedLinear(nn.Module):
    """Embedding → length 1 → (u − mean) / √(variance + 1e-5) → linear layer.

    Mean and variance are those of the training embeddings and never move, in whatever mode the module is.

    Args:
        unit: Training embeddings of length 1, `[row, width]`.
        num_classes: Number of logits.
        generator: Draws the linear layer, as `nn.Linear` would: uniform in ±1/√width.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, unit: Float[Tensor, "row width"], num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        n, width = unit.shape
        variance, mean = torch.var_mean(unit, dim=0, correction=int(n > 1))
        self.register_buffer("mean", mean)
        self.register_buffer("inverse_std", (variance + 1e-5).rsqrt())
        self.linear = nn.Linear(width, num_classes, device="meta").to_empty(device="cpu")
        for part in self.linear.parameters():
            nn.init.uniform_(part, -(width**-0.5), width**-0.5, generator=generator)
        self.to(unit.device)

    def standardise(self, embeddings: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """What the linear layer sees."""
        return (normalize(embeddings, dim=1) - self.mean) * self.inverse_std

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(self.standardise(embeddings))
        return logits


@settings
class LinearStd:
    """Linear probe as SSL-Backdoor and CorruptEncoder train it.

    Args:
        epochs: Passes over the training embeddings.
        lr: Learning rate; times 0.1 after each of `milestones` epochs.
        momentum, weight_decay: Of SGD; the decay is also on the bias.
        milestones: Finished epochs after which the learning rate drops. The published list ends with 40, where
            training ends too.
        batch_size: The last batch of an epoch may be smaller.

    Source: Saha et al., Backdoor Attacks on Self-Supervised Learning, CVPR 2022, and its code.
    Deviations: the embeddings are computed once from the images as they are; the published training crops and flips
        the images of each epoch.
    """

    epochs: PositiveInt = 40
    lr: Positive = 0.01
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    milestones: tuple[PositiveInt, ...] = (15, 30)
    batch_size: PositiveInt = 256

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def fit(self, encoder: Encoder, train: Dataset, seed: Seed) -> FrozenProbe:
        """Fit on the embeddings of `train`."""
        check_labels(train.labels, train.num_classes, train.name)
        return FrozenProbe(encoder, self.fit_features(features(encoder, train), train.labels, train.num_classes, seed))

    def fit_features(
        self,
        features: Float[Tensor, "row width"],
        labels: Int[Tensor, " row"],
        num_classes: int,
        seed: Seed,
        watch: Callable[[nn.Module], object] | None = None,
    ) -> nn.Module:
        """The head on raw embeddings; `seed` draws the first weights and the order of each epoch.

        Raises:
            DataError: no rows, or rows without label.
            UsageError: a class index outside [0, num_classes).
        """
        check_labels(labels, num_classes, "training data")
        y = labels.to(features.device)
        head = StandardisedLinear(normalize(features, dim=1), num_classes, seed.child("init").torch()).eval()
        x = head.standardise(features)
        sgd = torch.optim.SGD(
            head.linear.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, list(self.milestones), gamma=0.1)
        with torch.enable_grad(), track("linear_std", self.epochs) as advance:
            for epoch in range(self.epochs):
                order = torch.randperm(len(x), generator=seed.child("order", epoch).torch()).to(x.device)
                for rows in torch.split(order, self.batch_size):
                    loss = cross_entropy(head.linear(x[rows]), y[rows])
                    sgd.zero_grad()
                    loss.backward()
                    sgd.step()
                schedule.step()
                if watch is not None:
                    watch(head)
                advance(epoch + 1, loss=loss.item())
        return head
