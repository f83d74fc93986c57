"""How triggered embeddings lie to the references of a backdoor, as cosines."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["balance", "crowding", "nearest_reference"]


def nearest_reference(similarity: Float[Tensor, "reference row"]) -> Float[Tensor, ""]:
    """L0 = −mean over images of the largest similarity to a reference.

    Example:
        >>> float(nearest_reference(torch.tensor([[1.0, 0.0], [0.5, 0.5]])))
        -0.75
    """
    return -similarity.amax(dim=0).mean()


def balance(similarity: Float[Tensor, "reference row"]) -> Float[Tensor, ""]:
    """D = standard deviation (unbiased) over references of their mean similarity; 0 for one reference.

    Example:
        >>> round(float(balance(torch.tensor([[0.0, 0.0], [2.0, 2.0]]))), 4)
        1.4142
    """
    means = similarity.mean(dim=1)
    return means.std() if len(means) > 1 else means.sum() * 0


def crowding(L3: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Penalty of references that lie close together: L3 above 0.5, 0.2 · L3 above 0.4, else 0."""
    return torch.where(L3 > 0.5, L3, torch.where(L3 > 0.4, 0.2 * L3, torch.zeros_like(L3)))
