"""The downstream classifier of BadEncoder: two hidden layers on unit embeddings."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
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
from cupel.settings import Positive, PositiveInt, settings
from cupel.types import Dataset, Need

__all__ = ["Mlp2", "TwoHiddenLayers"]


class TwoHiddenLayers(nn.Module):
    """Embedding → length 1 → 512 → ReLU → 256 → ReLU → logits.

    Dropout stands between the first ReLU and the second layer and acts in `Mlp2.fit_features` alone, where its masks
    come from the seed; called as a module, the head never drops anything.

    Args:
        width: Of the embedding.
        num_classes: Number of logits.
        generator: Draws the layers, as `nn.Linear` would: uniform in ±1/√(inputs).
    """

    def __init__(self, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (width, 512, 256, num_classes)
        layers = [nn.Linear(a, b, device="meta").to_empty(device="cpu") for a, b in pairwise(sizes)]
        for layer in layers:
            bound = layer.in_features**-0.5
            for part in layer.parameters():
                nn.init.uniform_(part, -bound, bound, generator=generator)
        self.fc1, self.fc2, self.fc3 = layers

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits."""
        return self.logits(normalize(embeddings, dim=1))

    def logits(self, unit: Float[Tensor, "row width"], keep: Tensor | None = None) -> Float[Tensor, "row class"]:
        """Logits of embeddings of length 1; `keep` `[row, 512]` is multiplied onto the first hidden layer."""
        hidden = self.fc1(unit).relu()
        if keep is not None:
            hidden = hidden * keep
        logits: Tensor = self.fc3(self.fc2(hidden).relu())
        return logits


@settings
class Mlp2:
    """Two-layer perceptron as BadEncoder, DRUPE and INACTIVE train it; read at the last epoch.

    Args:
        epochs: Passes over the training embeddings.
        lr: Learning rate of Adam.
        batch_size: The last batch of an epoch may be smaller.
        dropout: Probability that a unit of the first hidden layer is dropped; in [0, 1).
        shuffle: Draw a new order for each epoch. The published code does not: it walks through the training images in
            the order of the file, which may be sorted by class.

    Source: Jia et al., BadEncoder, S&P 2022, and its code.
    Deviations: none in the recipe; the tensors stay on the device and Adam is fused.
    """

    epochs: PositiveInt = 500
    lr: Positive = 1e-4
    batch_size: PositiveInt = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    shuffle: bool = False

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
        """The head on raw embeddings; `seed` draws the first weights, the dropout masks and, if wanted, the order.

        Raises:
            DataError: no rows, or rows without label.
            UsageError: a class index outside [0, num_classes).
        """
        check_labels(labels, num_classes, "training data")
        device, n = features.device, len(features)
        x, y = normalize(features, dim=1), labels.to(device)
        head = TwoHiddenLayers(features.shape[1], num_classes, seed.child("init").torch()).to(device).eval()
        adam = torch.optim.Adam(head.parameters(), lr=self.lr, fused=True)
        with torch.enable_grad(), track("mlp2", self.epochs) as advance:
            for epoch in range(self.epochs):
                order = torch.arange(n)
                if self.shuffle:
                    order = torch.randperm(n, generator=seed.child("order", epoch).torch())
                masks = seed.child("dropout", epoch).torch(device)
                for rows in torch.split(order.to(device), self.batch_size):
                    keep = None
                    if self.dropout:
                        keep = torch.empty(len(rows), 512, device=device)
                        keep.bernoulli_(1 - self.dropout, generator=masks).div_(1 - self.dropout)
                    loss = cross_entropy(head.logits(x[rows], keep), y[rows])
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                if watch is not None:
                    watch(head)
                advance(epoch + 1, loss=loss.item())
        return head
