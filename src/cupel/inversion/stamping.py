"""Stamps: what a mask and a pattern do to images, and how alike the embeddings become."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["SPAN", "concentration", "squash", "stamp"]

SPAN = 2 - 1e-7  # keeps tanh(v)/span + ½ inside (0, 1)


def squash(v: Tensor) -> Tensor:
    """Unbounded variables → [0, 1], by tanh.

    Example:
        >>> [round(float(x), 4) for x in squash(torch.tensor([-10.0, 0.0, 10.0]))]
        [0.0, 0.5, 1.0]
    """
    return (torch.tanh(v) / SPAN + 0.5).clamp(0, 1)


def stamp(
    x: Float[Tensor, "*batch 3 height width"],
    mask: Float[Tensor, "*#batch 1 height width"],
    pattern: Float[Tensor, "*#batch 3 height width"],
) -> Float[Tensor, "*batch 3 height width"]:
    """`(1 − m)·x + m·p`, kept in [0, 1]."""
    return torch.lerp(x, pattern, mask).clamp(0, 1)


def concentration(embeddings: Float[Tensor, "*starts batch dim"]) -> Float[Tensor, "*starts"]:
    """Mean cosine between the embeddings of different images: 1 = all point the same way.

    conc = 1/(B(B−1)) · Σ_{i≠j} ⟨u_i, u_j⟩ with unit rows u, computed as (‖Σ u_i‖² − Σ ‖u_i‖²) / (B(B−1)).

    Args:
        embeddings: Two rows or more; a zero row counts as orthogonal to all.

    Example:
        >>> round(float(concentration(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))), 6)
        0.471405

    Source: Feng et al., DECREE, CVPR 2023, arXiv:2303.15180.
    Deviations: the reference code accepts |conc|; it is never far below zero for more than two rows.
    """
    u = nn.functional.normalize(embeddings.float(), dim=-1, eps=1e-12)
    n = u.shape[-2]
    if n < 2:
        raise ValueError("concentration needs two embeddings")
    return (u.sum(dim=-2).square().sum(dim=-1) - u.square().sum(dim=(-2, -1))) / (n * (n - 1))
