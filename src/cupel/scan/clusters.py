"""Clusters of embeddings: k-means, and how many clusters there are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cupel.seeds import Seed

__all__ = ["Clustering", "choose_clusters", "cluster", "knee", "merge_small", "unit"]

_MOST_ROUNDS = 100
_LEAST_BEND = 0.2
"""Distance of a knee from the straight line below which there is none (our choice; 0 = a line, 1 = one step)."""


class Clustering(NamedTuple):
    """Clusters of points.

    Args:
        own: int64 `[n]`, the cluster of each point.
        centres: `[clusters, dim]`.
        inertia: Sum of the squared distances to the own centre.
    """

    own: Int[Tensor, " n"]
    centres: Float[Tensor, "clusters dim"]
    inertia: float


def cluster(points: Float[Tensor, "n dim"], clusters: int, seed: Seed, restarts: int = 10) -> Clustering:
    """k-means from several k-means++ starts, all at once; the best counts. Computed on the CPU in float64.

    A cluster that loses all its points keeps its centre.

    Args:
        points: At least as many as clusters.
        clusters: K.
        seed: Starts.
        restarts: Number of starts.
    """
    x = points.detach().cpu().double()
    centres = torch.stack([_spread_starts(x, clusters, seed.child("kmeans", i)) for i in range(restarts)])
    own = torch.full((restarts, len(x)), -1)
    for _ in range(_MOST_ROUNDS):
        nearest = torch.cdist(x, centres).argmin(dim=2)
        if torch.equal(nearest, own):
            break
        own = nearest
        member = torch.nn.functional.one_hot(own, clusters).transpose(1, 2).double()
        counts = member.sum(dim=2, keepdim=True)
        centres = torch.where(counts > 0, member @ x / counts.clamp_min(1), centres)
    inertia = (x - centres.gather(1, own[..., None].expand(-1, -1, x.shape[1]))).square().sum(dim=(1, 2))
    best = int(inertia.argmin())
    return Clustering(own[best], centres[best].float(), float(inertia[best]))


def _spread_starts(x: Tensor, clusters: int, seed: Seed) -> Tensor:
    """k-means++: each further centre is a point, drawn with the squared distance to the nearest one as its weight."""
    draw = seed.torch()
    chosen = [int(torch.randint(len(x), (), generator=draw))]
    distance = (x - x[chosen[0]]).square().sum(dim=1)
    for _ in range(clusters - 1):
        weight = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(weight, 1, generator=draw)))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(dim=1))
    return x[chosen]


def knee(grid: Sequence[int], inertia: Sequence[float], window: int = 3) -> tuple[int, float]:
    """Where a falling curve bends, and how much.

    Each value is averaged with those that follow it, up to `window` in all; both axes are scaled to [0, 1]; the knee is
    where (1 − x) − y is largest.

    Example:
        >>> knee([2, 3, 4, 5, 6], [20, 10, 0, 0, 0])
        (4, 0.5)

    Source: Zheng et al., SSL-Cleanse, ECCV 2024, arXiv:2303.09079.
    Deviations: the paper's code for this part is not public; the window looks ahead, because one that is centred moves
    a sharp knee to the next value.
    """
    smooth = [statistics.fmean(inertia[i : i + window]) for i in range(len(inertia))]
    low, high = min(smooth), max(smooth)
    if high <= low or len(grid) < 2:
        return grid[0], 0.0
    span = grid[-1] - grid[0]
    bends = [1 - (k - grid[0]) / span - (y - low) / (high - low) for k, y in zip(grid, smooth, strict=True)]
    best = max(range(len(grid)), key=lambda i: bends[i])
    return grid[best], bends[best]


def choose_clusters(
    points: Float[Tensor, "n dim"], grid: Sequence[int], seed: Seed, rounds: int = 5, restarts: int = 3
) -> tuple[int, bool]:
    """K by sliding-window knees: the median over several rounds of k-means, and whether there was a knee at all.

    Args:
        points: To be clustered.
        grid: Values of K, rising.
        seed: Starts of k-means.
        rounds: Knees of which the median counts.
        restarts: Of each k-means.

    Source: Zheng et al., SSL-Cleanse, ECCV 2024, arXiv:2303.09079.
    Deviations: fewer restarts; without a knee the largest K, since K too large only splits clusters.
    """
    found = []
    for turn in range(rounds):
        inertia = [cluster(points, k, seed.child("round", turn, k), restarts).inertia for k in grid]
        found.append(knee(grid, inertia))
    if statistics.median(bend for _, bend in found) < _LEAST_BEND:
        return grid[-1], False
    return statistics.median_low(k for k, _ in found), True


def merge_small(points: Float[Tensor, "n dim"], made: Clustering, least: int) -> Clustering:
    """Points of clusters with fewer than `least` members go to the nearest of the others; numbers close up.

    The inertia is that of before. Where no cluster is large enough, nothing changes.
    """
    counts = torch.bincount(made.own, minlength=len(made.centres))
    large = (counts >= least).nonzero().flatten()
    if len(large) in (0, len(counts)):
        return made
    nearest = torch.cdist(points.cpu().float(), made.centres[large]).argmin(dim=1)
    number = torch.full((len(counts),), -1).index_put_((large,), torch.arange(len(large)))
    kept = number[made.own]
    own = torch.where(kept >= 0, kept, nearest)
    sums = torch.zeros(len(large), points.shape[1]).index_add_(0, own, points.cpu().float())
    return Clustering(own, sums / torch.bincount(own, minlength=len(large))[:, None], made.inertia)


def unit(z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Rows of length 1; zero rows stay."""
    return normalize(z, dim=-1, eps=1e-12)
