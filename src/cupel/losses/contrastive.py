"""Contrastive losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["nt_xent"]


def nt_xent(
    z1: Float[Tensor, "batch dim"], z2: Float[Tensor, "batch dim"], temperature: float = 0.5
) -> Float[Tensor, ""]:
    """Normalised temperature-scaled cross entropy between two views.

    ℓ(i, j) = −log( exp(s_ij / τ) / Σ_{k≠i} exp(s_ik / τ) ),  s = cosine similarity

    Args:
        z1, z2: Projections of two views; row i of both is the same image. Any norm.
        temperature: τ > 0.

    Returns:
        Mean over the 2·batch anchors, in nats.

    Raises:
        ValueError: fewer than two rows (no negatives), or temperature <= 0.

    Example:
        >>> round(float(nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)), 4)
        0.5514

    Source: Chen et al., SimCLR, ICML 2020, eq. 1, arXiv:2002.05709.
    Deviations: the mean over all anchors; the authors' TensorFlow code sums the means of the two halves, twice this.
    """
    if len(z1) < 2:
        raise ValueError(f"nt_xent needs at least two rows for negatives, got {len(z1)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with torch.autocast(z1.device.type, enabled=False):  # mixed precision ends at the projections
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
        similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))  # k ≠ i
        n = len(z1)
        positive = torch.arange(2 * n, device=z.device).roll(n)
        return F.cross_entropy(similarity, positive)
