"""Losses that keep the dimensions of two views equal and unlike each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["barlow_twins_loss", "cross_correlation"]


def cross_correlation(z1: Float[Tensor, "batch dim"], z2: Float[Tensor, "batch dim"]) -> Float[Tensor, "dim dim"]:
    """Correlation over the batch of every dimension of one view with every dimension of the other.

    C = BN(z₁)ᵀ BN(z₂) / N, where BN takes off the mean and divides by √(biased variance + 10⁻⁵), so equal views give
    a diagonal a little below 1.

    Args:
        z1, z2: Projections; row i of both is the same image.

    Returns:
        float32 (float64 for float64), also under autocast.

    Raises:
        ValueError: fewer than two rows.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> cross_correlation(z, -z).round(decimals=3).tolist()
        [[-1.0, 0.0], [0.0, -1.0]]
    """
    if len(z1) < 2:
        raise ValueError(f"a correlation needs at least two rows, got {len(z1)}")
    with torch.autocast(z1.device.type, enabled=False):  # else autocast rounds the products to bf16
        wide = torch.promote_types(z1.dtype, torch.float32)
        a, b = (F.batch_norm(z.to(wide), None, None, training=True, eps=1e-5) for z in (z1, z2))
        return a.T @ b / len(a)


def barlow_twins_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    redundancy: float = 0.0051,
    scale: float = 1.0,
) -> Float[Tensor, ""]:
    """How far the cross-correlation of two views is from the identity.

    L = scale · [ Σ_i (1 − C_ii)² + λ Σ_{i≠j} C_ij² ]

    Args:
        z1, z2: Projections; row i of both is the same image.
        redundancy: λ ≥ 0.
        scale: Factor of the whole; 0.1 in solo-learn, 0.024 in the authors' ImageNet recipe.

    Raises:
        ValueError: fewer than two rows.

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> round(float(barlow_twins_loss(z, -z)), 3)
        8.0

    Source: Zbontar et al., Barlow Twins, ICML 2021, eqs. 1 and 2, arXiv:2103.03230.
    """
    c = cross_correlation(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        on = (1 - c.diagonal()).square().sum()
        off = c.square().fill_diagonal_(0).sum()
        return scale * (on + redundancy * off)
