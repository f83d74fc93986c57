"""Losses that pull embeddings back to where they belong, and the one that drives adversaries away from there."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "EmbeddingScale",
    "PullName",
    "Whitening",
    "cosine_pull",
    "decorrelated_pull",
    "info_nce",
    "nmse_pull",
    "pull_distance",
    "spread",
    "whitened_pull",
]

PullName = Literal["cosine", "nmse", "cosine+nmse", "whitened"]

_FLOOR = 0.2  # share of the mean standard deviation: dimensions that hardly vary are not blown up
_LEAST = 0.05  # share of the mean variance, for the same reason


class EmbeddingScale(NamedTuple):
    """How clean embeddings are placed and how far they spread; the unit in which pulls are measured.

    Args:
        mean: `[dim]`.
        std: `[dim]`, standard deviation per dimension plus a fifth of its mean over the dimensions.
        square: Mean squared norm, scalar.
    """

    mean: Float[Tensor, " dim"]
    std: Float[Tensor, " dim"]
    square: Float[Tensor, ""]

    @staticmethod
    def of(embeddings: Float[Tensor, "row dim"]) -> EmbeddingScale:
        """Measure it on clean images, two or more.

        Example:
            >>> scale = EmbeddingScale.of(torch.tensor([[0.0, 3.0], [2.0, 3.0]]))
            >>> scale.mean.tolist(), [round(s, 2) for s in scale.std.tolist()], float(scale.square)
            ([1.0, 3.0], [1.1, 0.1], 11.0)
        """
        z = embeddings.float()
        if len(z) < 2:
            raise ValueError(f"a scale needs at least two embeddings, got {len(z)}")
        std = z.std(dim=0, correction=0)
        return EmbeddingScale(z.mean(dim=0), std + _FLOOR * std.mean(), z.square().sum(dim=1).mean())


class Whitening(NamedTuple):
    """What makes clean embeddings uncorrelated and of equal spread in all directions.

    Args:
        mean: `[dim]`.
        matrix: `[dim, dim]`; a column per principal axis, divided by the root of its variance plus a twentieth of the
            mean variance.
    """

    mean: Float[Tensor, " dim"]
    matrix: Float[Tensor, "dim dim"]

    @staticmethod
    def of(embeddings: Float[Tensor, "row dim"]) -> Whitening:
        """Measure it on clean images, two or more.

        Example:
            >>> white = Whitening.of(torch.tensor([[0.0, 3.0], [2.0, 3.0]]))
            >>> white.mean.tolist(), [round(n, 3) for n in white.matrix.norm(dim=1).tolist()]
            ([1.0, 3.0], [0.988, 6.325])
        """
        z = embeddings.double()
        if len(z) < 2:
            raise ValueError(f"whitening needs at least two embeddings, got {len(z)}")
        mean = z.mean(dim=0)
        variance, axes = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
        root = (variance.clamp(min=0) + _LEAST * variance.mean() + 1e-24).sqrt()
        return Whitening(mean.float(), (axes / root).float())


def cosine_pull(embeddings: Float[Tensor, "batch dim"], targets: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean of 1 − cos(embedding, target), in [0, 2].

    Its gradient is tangential: a shift that dominates the norm is turned, not shortened (see `nmse_pull`).

    Example:
        >>> float(cosine_pull(torch.eye(2), torch.eye(2).flip(0)))
        1.0
    """
    return (1 - F.cosine_similarity(embeddings.float(), targets.float(), dim=1, eps=1e-12)).mean()


def nmse_pull(
    embeddings: Float[Tensor, "batch dim"], targets: Float[Tensor, "batch dim"], square: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Mean of ‖embedding − target‖² / `square`; 0 = equal.

    Args:
        embeddings, targets: Row i belongs to row i.
        square: Mean squared norm of clean embeddings, > 0.

    Example:
        >>> float(nmse_pull(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor(3.0)))
        1.0
    """
    return (embeddings.float() - targets.float()).square().sum(dim=1).mean() / square


def whitened_pull(
    embeddings: Float[Tensor, "batch dim"], targets: Float[Tensor, "batch dim"], scale: EmbeddingScale
) -> Float[Tensor, ""]:
    """Cosine pull between embeddings standardised per dimension, (z − mean) / std.

    Where all clean embeddings share a large common part, the plain cosine is almost 1 while a linear probe still sees
    the difference; without that part it is not.

    Source: our choice.
    """
    a, b = ((z.float() - scale.mean) / scale.std for z in (embeddings, targets))
    return cosine_pull(a, b)


def decorrelated_pull(
    embeddings: Float[Tensor, "batch dim"], targets: Float[Tensor, "batch dim"], white: Whitening
) -> Float[Tensor, ""]:
    """Cosine pull between whitened embeddings, (z − mean) · matrix.

    Standardising each dimension leaves correlated ones in: a few directions then carry most of the length, and what a
    linear probe reads from the others may drift unseen.

    Source: our choice; the whitening is that of principal components, which gives the cosines of any other whitening.
    """
    a, b = ((z.float() - white.mean) @ white.matrix for z in (embeddings, targets))
    return cosine_pull(a, b)


def pull_distance(
    name: PullName,
    embeddings: Float[Tensor, "batch dim"],
    targets: Float[Tensor, "batch dim"],
    scale: EmbeddingScale,
) -> Float[Tensor, ""]:
    """The distance called `name`; every one is 0 for equal rows."""
    match name:
        case "cosine":
            return cosine_pull(embeddings, targets)
        case "nmse":
            return nmse_pull(embeddings, targets, scale.square)
        case "cosine+nmse":
            return cosine_pull(embeddings, targets) + nmse_pull(embeddings, targets, scale.square)
        case "whitened":
            return whitened_pull(embeddings, targets, scale)


def info_nce(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    own: Int[Tensor, " queries"],
    temperature: float = 0.5,
) -> Float[Tensor, ""]:
    """Cross entropy of picking a query's own key among all keys by cosine similarity.

    L = −mean_i [ s_{i,own(i)} / τ − log Σ_j exp(s_ij / τ) ]

    Args:
        queries: Embeddings of perturbed images, any norm.
        keys: Embeddings of clean images, any norm; the caller stops their gradient.
        own: int64, the row of `keys` that belongs to each query.
        temperature: τ > 0.

    Returns:
        Mean over the queries, in nats.

    Raises:
        ValueError: temperature <= 0.

    Example:
        >>> round(float(info_nce(torch.eye(2), torch.eye(2), torch.arange(2))), 6)
        0.126928

    Source: van den Oord et al., arXiv:1807.03748, eq. 4, with the cosine similarity of SimCLR.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with torch.autocast(queries.device.type, enabled=False):  # else autocast rounds the similarities to bf16
        u, z = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
        return F.cross_entropy(u @ z.T / temperature, own)


def spread(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Standard deviation of unit embeddings, mean over the dimensions, times √dim: about 1 healthy, 0 collapsed.

    Example:
        >>> float(spread(torch.ones(4, 3)))
        0.0
    """
    unit = F.normalize(embeddings.float(), dim=1)
    scaled: Tensor = unit.std(dim=0).mean() * embeddings.shape[1] ** 0.5
    return scaled
