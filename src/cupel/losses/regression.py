"""Losses that predict one view's projection from the other's, without negatives."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cupel.losses.alignment import negative_cosine

__all__ = ["byol_loss", "simsiam_loss"]


def byol_loss(
    p1: Float[Tensor, "batch dim"],
    p2: Float[Tensor, "batch dim"],
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
) -> Float[Tensor, ""]:
    """Squared distance of unit predictions and unit targets, crosswise, summed over the two directions.

    L = mean(2 − 2 cos(p₁, sg z₂)) + mean(2 − 2 cos(p₂, sg z₁))

    Args:
        p1, p2: Predictions from the two views, any norm.
        z1, z2: The momentum network's projections of the two views, any norm; no gradient reaches them.

    Returns:
        Scalar in [0, 8]; 0 = all aligned.

    Example:
        >>> import torch
        >>> one = torch.eye(2)
        >>> float(byol_loss(one, one, one, one)), float(byol_loss(one, one, -one, -one))
        (0.0, 8.0)

    Source: Grill et al., BYOL, NeurIPS 2020, eq. 2, arXiv:2006.07733.
    """
    return 4 + 2 * (negative_cosine(p1, z2.detach()) + negative_cosine(p2, z1.detach()))


def simsiam_loss(
    p1: Float[Tensor, "batch dim"],
    p2: Float[Tensor, "batch dim"],
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
) -> Float[Tensor, ""]:
    """Negative cosine similarity of predictions and the other view's projections, mean of the two directions.

    L = −½ [ cos(p₁, sg z₂) + cos(p₂, sg z₁) ]

    Args:
        p1, p2: Predictions from the two views, any norm.
        z1, z2: Projections of the two views, any norm; no gradient reaches them here, but through p.

    Returns:
        Scalar in [−1, 1]; −1 = all aligned.

    Example:
        >>> import torch
        >>> float(simsiam_loss(*[torch.eye(2)] * 4))
        -1.0

    Source: Chen & He, SimSiam, CVPR 2021, eqs. 3 and 4, arXiv:2011.10566.
    """
    return (negative_cosine(p1, z2.detach()) + negative_cosine(p2, z1.detach())) / 2
