"""How a batch of embeddings is spread: distances between two of them, and concentration of one. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["directions", "mean_pair_cosine", "sinkhorn_distance", "sliced_wasserstein"]


def directions(count: int, dim: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
    """Random directions, uniform on the unit sphere, on the generator's device."""
    drawn = torch.randn(count, dim, generator=generator, device=generator.device)
    return F.normalize(drawn, dim=1)


def sliced_wasserstein(
    a: Float[Tensor, "row dim"], b: Float[Tensor, "row dim"], along: Float[Tensor, "count dim"]
) -> Float[Tensor, ""]:
    """Sliced Wasserstein distance of order 2 between two samples of equal size.

    SW(a, b) = √( mean over directions θ of mean_i (⟨a, θ⟩_(i) − ⟨b, θ⟩_(i))² ),  (i) = i-th smallest

    Args:
        a, b: Samples of any scale; the distance scales with them.
        along: Unit vectors.

    Returns:
        Scalar ≥ 0. Where both samples are the same, the gradient is 0.

    Example:
        >>> a = torch.tensor([[0.0], [1.0]])
        >>> float(sliced_wasserstein(a, a.flip(0) + 2, torch.ones(1, 1)))
        2.0

    Source: Bonneel et al., Sliced and Radon Wasserstein barycenters, JMIV 2015; the arithmetic of the package POT.
    """
    if a.shape != b.shape:
        raise ValueError(f"samples of equal size are needed, got {list(a.shape)} and {list(b.shape)}")
    sorted_a, sorted_b = ((one @ along.T).sort(dim=0).values for one in (a, b))
    square = (sorted_a - sorted_b).square().mean()
    # the root's slope at 0 is infinite
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)


def mean_pair_cosine(z: Float[Tensor, "row dim"], include_self: bool = False) -> Float[Tensor, ""]:
    """Mean cosine of all pairs of rows, each counted once.

    Args:
        z: Embeddings of any norm; one row has no pair but itself.
        include_self: Each row makes a pair with itself as well, of cosine 1.

    Returns:
        In [−1, 1]; 1 = collapsed to one direction. O(rows · dim) time.

    Example:
        >>> float(mean_pair_cosine(torch.eye(3))), float(mean_pair_cosine(torch.eye(3), include_self=True))
        (0.0, 0.5)
    """
    n = len(z)
    if n < 2 and not include_self:
        raise ValueError(f"pairs of different rows need two rows, got {n}")
    u = F.normalize(z, dim=1, eps=1e-12)
    both = u.sum(dim=0).square().sum()  # Σ_i Σ_j ⟨u_i, u_j⟩
    own = u.square().sum()
    return (both + own) / (n * (n + 1)) if include_self else (both - own) / (n * (n - 1))


def sinkhorn_distance(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"], epsilon: float = 0.1, iterations: int = 50
) -> Float[Tensor, ""]:
    """Cost of the entropy-regularised transport plan between two samples with equal weights.

    Args:
        a, b: Samples; the cost of a pair is its squared Euclidean distance.
        epsilon: Weight of the entropy, in the unit of the cost.
        iterations: Sinkhorn steps, in the log domain.

    Returns:
        ⟨P, C⟩ ≥ 0; it approaches the squared Wasserstein distance as `epsilon` → 0, and is above 0 even for a = b.

    Source: Cuturi, Sinkhorn distances, NeurIPS 2013.
    """
    cost = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
    log_a, log_b = -torch.tensor(float(len(a))).log(), -torch.tensor(float(len(b))).log()
    kernel = -cost / epsilon
    f, g = kernel.new_zeros(len(a)), kernel.new_zeros(len(b))
    for _ in range(iterations):
        f = log_a - (kernel + g).logsumexp(dim=1)
        g = log_b - (kernel + f[:, None]).logsumexp(dim=0)
    plan = (kernel + f[:, None] + g).exp()
    return (plan * cost).sum()
