"""Mutual information of two random vectors from samples, by a small critic."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cupel.pretrain.heads import mlp
from cupel.seeds import Seed

__all__ = ["donsker_varadhan", "mutual_information"]


def donsker_varadhan(joint: Float[Tensor, " n"], shuffled: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Lower bound of the mutual information from a critic's scores: E[T | pairs] − log E[exp T | shuffled pairs].

    Example:
        >>> float(donsker_varadhan(torch.ones(2), torch.ones(3)))
        0.0

    Source: Belghazi et al., MINE, ICML 2018, arXiv:1801.04062, eq. 10.
    """
    return joint.mean() - (shuffled.logsumexp(dim=0) - math.log(len(shuffled)))


def mutual_information(
    a: Float[Tensor, "n p"],
    b: Float[Tensor, "n q"],
    seed: Seed,
    *,
    steps: int = 400,
    batch_size: int = 512,
    hidden: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
) -> float:
    """Mutual information of the rows of `a` and `b`, in nats, by MINE.

    Half of the rows train the critic, the bound is taken on the other half: a critic that learned its pairs by heart
    says nothing there. Columns are standardised first.

    Args:
        a, b: Row i belongs to row i; at least four rows.
        seed: Of halves, critic, batches and shuffles.
        steps: Of Adam.
        batch_size: Pairs per step, at most all.
        hidden: Width of the critic's two hidden layers.
        lr, weight_decay: Adam's.

    Returns:
        The bound with shuffles averaged; it may come out below 0, where there is none.

    Source: Belghazi et al., MINE, ICML 2018, arXiv:1801.04062.
    Deviations: held-out pairs; no correction of the gradient's bias by a moving average.
    """
    n = len(a)
    if n < 4 or len(b) != n:
        raise ValueError(f"pairs of rows are needed, four or more, got {n} and {len(b)}")
    pairs = [(one.float() - one.float().mean(0)) / (one.float().std(0) + 1e-6) for one in (a, b)]
    order = torch.randperm(n, generator=seed.child("halves").torch()).to(a.device)
    fit_a, fit_b = (one[order[n // 2 :]] for one in pairs)
    held_a, held_b = (one[order[: n // 2]] for one in pairs)
    critic = mlp(a.shape[1] + b.shape[1], hidden, hidden, 1, seed=seed.child("critic"), norm=False).to(a.device)
    adam = torch.optim.Adam(critic.parameters(), lr, weight_decay=weight_decay)

    def bound(x: Tensor, y: Tensor, draw: Seed) -> Tensor:
        other = y[torch.randperm(len(y), generator=draw.torch()).to(y.device)]
        scores: Tensor = critic(torch.cat([torch.cat([x, y], dim=1), torch.cat([x, other], dim=1)]))
        return donsker_varadhan(scores[: len(x), 0], scores[len(x) :, 0])

    size = min(batch_size, len(fit_a))
    with torch.enable_grad():
        for step in range(steps):
            draw = seed.child("step", step)
            rows = torch.randperm(len(fit_a), generator=draw.child("rows").torch())[:size].to(a.device)
            adam.zero_grad(set_to_none=True)
            (-bound(fit_a[rows], fit_b[rows], draw.child("shuffle"))).backward()
            adam.step()
    with torch.no_grad():
        found = [bound(held_a, held_b, seed.child("held", i)) for i in range(8)]
    return float(torch.stack(found).mean())
