"""Losses that align embeddings with targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["negative_cosine"]


def negative_cosine(a: Float[Tensor, "batch dim"], b: Float[Tensor, "#batch dim"]) -> Float[Tensor, ""]:
    """−mean cosine similarity of rows; `b` may be one row for all.

    Args:
        a: Embeddings of any norm.
        b: Targets, `[batch, dim]` or `[1, dim]`.

    Returns:
        Scalar in [−1, 1]; −1 = all aligned.

    Example:
        >>> float(negative_cosine(torch.eye(2), torch.eye(2)))
        -1.0
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    return -F.cosine_similarity(a.to(wide), b.to(wide), dim=1, eps=1e-12).mean()
