"""The smallest stamp that moves images of other clusters into a cluster, for all clusters at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from cupel.errors import CupelError
from cupel.inversion.forms import random_start
from cupel.inversion.invert import Adam, Inverted
from cupel.inversion.stamping import squash, stamp
from cupel.progress import track
from cupel.seeds import Seed
from cupel.threads import guarded

__all__ = ["ClusterSearch", "Weight", "invert_clusters"]


class Weight(NamedTuple):
    """λ of each cluster, and the length of its current run of successes or failures; each `[clusters]`."""

    cost: Float[Tensor, " clusters"]
    up: Int[Tensor, " clusters"]
    down: Int[Tensor, " clusters"]


@dataclass(frozen=True)
class ClusterSearch:
    """How long and how the search runs.

    Args:
        steps: Batches per cluster.
        batch_size: Images of other clusters per batch.
        lr: Of Adam with β = (0.5, 0.9).
        success: Share of a batch that must arrive for the step to succeed.
        cost: λ once `patience` steps in a row succeeded; before that it is 0.
        cost_factor: λ is multiplied by it after as many successes in a row, divided by it after as many failures.
        patience: See above.
        toward: What stamped embeddings are pulled to: a random member of the cluster each, or its mean direction.

    Source: Zheng et al., SSL-Cleanse, ECCV 2024, arXiv:2303.09079, and its code.
    """

    steps: int
    batch_size: int = 32
    lr: float = 0.1
    success: float = 0.99
    cost: float = 0.1
    cost_factor: float = 1.5
    patience: int = 5
    toward: Literal["member", "centre"] = "member"

    def begin(self, clusters: int, device: torch.device | str = "cpu") -> Weight:
        """λ = 0 everywhere."""
        zeros = torch.zeros(clusters, dtype=torch.int64, device=device)
        return Weight(torch.zeros(clusters, dtype=torch.float64, device=device), zeros, zeros)

    def after(self, state: Weight, success: Bool[Tensor, " clusters"]) -> Weight:
        """The state after one step.

        Example:
            >>> search, state = ClusterSearch(steps=9), ClusterSearch(steps=9).begin(1)
            >>> for _ in range(9):
            ...     state = search.after(state, torch.tensor([True]))
            >>> round(float(state.cost), 3)
            0.15
        """
        up = torch.where(success, state.up + 1, 0)
        begins = (state.cost == 0) & (up >= self.patience)
        down = torch.where(success | (state.cost == 0), 0, state.down + 1)
        # the step that sets λ counts as the first of the next run, as in the authors' code
        up = torch.where(begins, 1, up)
        raised, lowered = (state.cost > 0) & (up >= self.patience), down >= self.patience
        cost = torch.where(begins, self.cost, state.cost)
        cost = torch.where(raised, cost * self.cost_factor, cost)
        cost = torch.where(lowered, cost / self.cost_factor, cost)
        return Weight(cost, torch.where(raised, 0, up), torch.where(lowered, 0, down))


def invert_clusters(
    embed: Callable[[Tensor], Tensor],
    images: UInt8[Tensor, "n 3 height width"],
    clean: Float[Tensor, "n dim"],
    own: Int[Tensor, " n"],
    search: ClusterSearch,
    seed: Seed,
    label: str = "ssl_cleanse",
    model: str = "encoder",
) -> Inverted:
    """For each cluster the smallest mask whose pattern sends images of the other clusters to it.

    Minimises mean(2 − 2 cos(f((1 − m) x + m Δ), r)) + λ · mean(m) by Adam. An image arrived when the clean embedding
    nearest to it in angle is in the cluster.

    Args:
        embed: Images in [0, 1] → embeddings; its weights must need no gradient.
        images: Clean, on the device of the encoder.
        clean: Their embeddings.
        own: Their clusters, 0 to K − 1, each with a member and with an image outside of it.
        search: Settings.
        seed: Start values, images, members.
        label: For the progress display.
        model: Name of the model, for errors.

    Returns:
        One entry per cluster; `size` is the mean of the mask, 1 where no step succeeded; `reach` is the share that
        arrived.

    Raises:
        CupelError: NaN or infinite values.

    Source: Zheng et al., SSL-Cleanse, ECCV 2024, arXiv:2303.09079, and its code.
    Deviations: λ weighs mean(m) instead of mean(m·Δ), by which a dark pattern looks small; success is judged on each
    batch instead of on 1000 images after each epoch; all clusters share the forward passes.
    """
    height, width = images.shape[-2:]
    device, own = images.device, own.to(images.device)
    z, count = normalize(clean, dim=1, eps=1e-12), int(own.max()) + 1
    members = [(own == k).nonzero().flatten() for k in range(count)]
    others = [(own != k).nonzero().flatten() for k in range(count)]
    batch = min(search.batch_size, *(len(rows) for rows in others))
    centres = normalize(torch.stack([z[rows].mean(dim=0) for rows in members]), dim=1, eps=1e-12)
    v = random_start(count, height, width, seed).to(device)
    adam, state = Adam(v, (0.5, 0.9)), search.begin(count, device)
    best, kept = torch.full((count,), math.inf, device=device), squash(v)
    reached = torch.zeros(count, device=device)
    targets = torch.arange(count, device=device)[:, None]
    guard = guarded(device.type, torch.get_num_threads, torch.set_num_threads)
    with torch.enable_grad(), track(label, search.steps) as advance:
        for step in range(search.steps):
            draw = seed.child("step", step).torch()
            rows = torch.stack([one[torch.randperm(len(one), generator=draw)[:batch].to(device)] for one in others])
            if search.toward == "member":
                picks = [one[torch.randint(len(one), (batch,), generator=draw).to(device)] for one in members]
                aims = z[torch.stack(picks)]
            else:
                aims = centres[:, None].expand(-1, batch, -1)
            v.requires_grad_(True)
            trigger = squash(v)
            stamped = stamp(images[rows].float().div_(255), trigger[:, None, :1], trigger[:, None, 1:])
            u = normalize(embed(stamped.flatten(0, 1)), dim=1, eps=1e-12)
            distance = 2 - 2 * (u.reshape(count, batch, -1) * aims).sum(dim=2)
            size = trigger[:, 0].mean(dim=(1, 2))
            (slope,) = torch.autograd.grad((distance.mean(dim=1) + state.cost.float() * size).sum(), v)
            with torch.no_grad():
                arrived = (own[(u @ z.T).argmax(dim=1)].view(count, batch) == targets).float().mean(dim=1)
                success, size = arrived >= search.success, size.detach()
                better = success & (size < best)
                keep = better | (best.isinf() & ~success)
                kept = torch.where(keep[:, None, None, None], trigger.detach(), kept)
                reached = torch.where(keep, arrived, reached)
                best = torch.where(better, size, best)
                state = search.after(state, success)
                v = adam.step(v.detach(), slope, search.lr)
            if guard is not None:
                guard.step()
            advance(step + 1)
    if not bool(v.isfinite().all()):
        raise CupelError(model, "gives NaN or infinite values", "check its weights and normalisation")
    found = best.isfinite()
    return Inverted(
        mask=kept[:, 0].cpu(),
        pattern=kept[:, 1:].cpu(),
        size=torch.where(found, best, 1.0).cpu(),
        reach=reached.cpu(),
        found=found.cpu(),
        steps=torch.full((count,), search.steps),
    )
