"""Weighted k-nearest-neighbour classifier on cosine similarity."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from cupel.inference import FrozenProbe, evaluating, features
from cupel.metrics import check_labels
from cupel.protocols import Encoder
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.types import Dataset, Need

__all__ = ["Knn", "knn_votes"]

BLOCK = 1 << 24
"""Similarities held at once: 64 MiB of float32."""


def knn_votes(
    queries: Float[Tensor, "query dim"],
    bank: Float[Tensor, "row dim"],
    labels: Int[Tensor, " row"],
    num_classes: int,
    k: int,
    temperature: float,
) -> Float[Tensor, "query class"]:
    """Share of the vote that each class gets from the k most similar rows of the bank.

    vote(c) ∝ Σ_{i among the k nearest, y_i = c} exp(⟨q, b_i⟩ / t)

    Args:
        queries, bank: Rows of length 1.
        labels: Class of each row of the bank.
        num_classes: C.
        k: Neighbours, cut to the rows of the bank. Which of several equally similar rows fills the last place is
            left to `torch.topk`.
        temperature: t > 0.

    Returns:
        Shares that sum to 1.

    Example:
        >>> bank, y = torch.eye(2), torch.tensor([0, 1])
        >>> knn_votes(torch.eye(2)[:1], bank, y, 2, k=1, temperature=0.5).tolist()
        [[1.0, 0.0]]
    """
    k = min(k, len(bank))
    shares = []
    for block in torch.split(queries, max(1, BLOCK // len(bank))):
        near, rows = (block @ bank.T).topk(k, dim=1)
        # less the largest in the exponent: the shares stay, a small temperature cannot overflow
        weight = torch.exp((near - near[:, :1]) / temperature)
        votes = weight.new_zeros(len(block), num_classes).scatter_add(1, labels[rows], weight)
        shares.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(shares)


class _Neighbours(nn.Module):
    """Head that remembers the training embeddings."""

    bank: Tensor
    labels: Tensor

    def __init__(self, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> None:
        super().__init__()
        self.register_buffer("bank", bank)
        self.register_buffer("labels", labels)
        self.num_classes, self.k, self.temperature = num_classes, k, temperature

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logarithm of the vote shares, so that softmax gives them back; classes without a vote stay finite."""
        queries = normalize(embeddings, dim=1)
        votes = knn_votes(queries, self.bank, self.labels, self.num_classes, self.k, self.temperature)
        return votes.clamp_min(torch.finfo(votes.dtype).tiny).log()


@settings
class Knn:
    """k nearest neighbours by cosine similarity, each with the weight exp(similarity / temperature).

    Nothing is trained and nothing random: all head seeds give the same classifier.

    Args:
        k: Neighbours that vote; cut to the number of training images.
        temperature: t > 0; the smaller, the more the nearest count.

    Source: Wu et al., Instance Discrimination, CVPR 2018, section 3.4; k = 200 and t = 0.5 as in the monitor of
        SimCLR's and BadEncoder's code (CTRL: t = 0.1).
    """

    k: PositiveInt = 200
    temperature: Positive = 0.5

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def fit(self, encoder: Encoder, train: Dataset, seed: Seed) -> FrozenProbe:
        """Remember the embeddings of `train`."""
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
        """The head on raw embeddings.

        Raises:
            DataError: no rows, or rows without label.
            UsageError: a class index outside [0, num_classes).
        """
        check_labels(labels, num_classes, "training data")
        bank = normalize(features, dim=1)
        head = _Neighbours(bank, labels.to(bank.device), num_classes, self.k, self.temperature).eval()
        if watch is not None:
            with evaluating(head):
                watch(head)
        return head
