"""Contrast against a queue of earlier keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["queue_nce"]


def queue_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "size dim"],
    temperature: float = 0.2,
) -> Float[Tensor, ""]:
    """Cross entropy of picking a query's own key among it and all keys of the queue.

    ℓ(q, k, Q) = −q·k / τ + log( exp(q·k / τ) + Σ_j exp(q·Q_j / τ) ),  q and k of length 1

    Args:
        queries: Projections, any norm.
        keys: The momentum network's projections of other views of the same images, any norm; no gradient reaches them.
        queue: Earlier keys of length 1, one per row (the paper's columns); no gradient reaches them.
        temperature: τ > 0.

    Returns:
        Mean over the queries, in nats.

    Raises:
        ValueError: temperature <= 0.

    Example:
        >>> round(float(queue_nce(torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(3)[1:], temperature=1.0)), 4)
        0.5514

    Source: He et al., MoCo, CVPR 2020, eq. 1, arXiv:1911.05722.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with torch.autocast(queries.device.type, enabled=False):  # else autocast rounds the similarities to bf16
        q, k = F.normalize(queries.float(), dim=1), F.normalize(keys.detach().float(), dim=1)
        own = (q * k).sum(dim=1, keepdim=True)
        logits = torch.cat([own, q @ queue.detach().float().T], dim=1) / temperature
        return (logits.logsumexp(dim=1) - logits[:, 0]).mean()
