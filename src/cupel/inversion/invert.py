"""Mask and pattern by Adam, from several starts in one pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from cupel.errors import CupelError
from cupel.inversion.budget import Budget
from cupel.inversion.forms import Form, Stamp, random_start
from cupel.progress import track
from cupel.seeds import Seed
from cupel.threads import guarded

__all__ = ["Adam", "Inverted", "Objective", "frozen", "invert", "random_start"]

Objective = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`objective(stamped, starts, rows)` → the loss to minimise and how far the goal is reached, both `[starts]`.

`stamped` is `[starts, batch, 3, height, width]` in [0, 1], `starts` int64 numbers of the starts still running, `rows`
int64 `[starts, batch]` the images used. Reach is compared with `Budget.goal` (DECREE: concentration; Neural Cleanse:
share of images classified as the target).
"""


@dataclass(frozen=True)
class Inverted:
    """What each start ended with; tensors on the CPU.

    Args:
        mask: `[starts, height, width]` in [0, 1]: the smallest that reached the goal, else the last one.
        pattern: `[starts, 3, height, width]` in [0, 1].
        size: `[starts]`, of the form (of a stamp the mean of its mask); 1 where the goal was never reached.
        reach: `[starts]`, of the batch that the mask was kept from (the last batch where none succeeded).
        found: `[starts]`, the goal was reached.
        steps: `[starts]`, batches used.
        path: `[starts, steps, 2]`, size and reach at each batch, NaN after the last batch of a start; None = not
            recorded.
    """

    mask: Float[Tensor, "starts height width"]
    pattern: Float[Tensor, "starts 3 height width"]
    size: Float[Tensor, " starts"]
    reach: Float[Tensor, " starts"]
    found: Bool[Tensor, " starts"]
    steps: Int[Tensor, " starts"]
    path: Float[Tensor, "starts steps 2"] | None = None


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients to weights inside the `with`; modes and flags of before come back after it."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [(weight, weight.requires_grad) for weight in module.parameters()]
    try:
        module.eval()
        module.requires_grad_(False)
        yield
    finally:
        for part, training in modes:
            part.training = training
        for weight, flag in flags:
            weight.requires_grad_(flag)


class Adam:
    """Adam over starts that may leave: `torch.optim` cannot drop rows of a parameter."""

    def __init__(self, like: Tensor, betas: tuple[float, float]) -> None:
        self.first, self.second, self.betas, self.t = torch.zeros_like(like), torch.zeros_like(like), betas, 0

    def step(self, v: Tensor, gradient: Tensor, lr: float) -> Tensor:
        """The variables after one update."""
        self.t += 1
        b1, b2 = self.betas
        self.first.lerp_(gradient, 1 - b1)
        self.second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        scale = (self.second.sqrt() / math.sqrt(1 - b2**self.t)).add_(1e-8)
        return v - lr / (1 - b1**self.t) * self.first / scale

    def keep(self, rows: Tensor) -> None:
        """Go on with the given starts alone."""
        self.first, self.second = self.first[rows], self.second[rows]


def invert(
    objective: Objective,
    images: UInt8[Tensor, "n 3 height width"],
    num_starts: int,
    budget: Budget,
    seed: Seed,
    label: str = "invert",
    model: str = "model",
    form: Form | None = None,
) -> Inverted:
    """Minimise `loss + λ · size · 3 · height · width` by Adam, with λ steered by success, for every start.

    The size of a stamp is the mean of its mask: λ weighs the sum of the mask over pixels and channels.

    The starts share one forward pass but nothing else: each has its own variables, batches, λ and best trigger, and
    leaves the pass when it stops early.

    Args:
        objective: Loss and reach per start; it runs the encoder, which must be `frozen`.
        images: Clean images on the device of the encoder.
        num_starts: Random starts, at least 1.
        budget: Steps and rates.
        seed: Start values and batch order.
        label: For the progress display.
        model: Name of the model, for errors.
        form: What the trigger may look like; None = a `Stamp`.

    Returns:
        The smallest successful trigger of each start.
    Raises:
        CupelError: the objective is NaN or infinite.

    Source: Wang et al., Neural Cleanse, S&P 2019; Feng et al., DECREE, CVPR 2023, arXiv:2303.15180, and its code.
    Deviations: float32 and [0, 1] instead of float64 and 0–255; mask and pattern are kept together with the best size
    (the code may lose them between epochs).
    """
    n, _, height, width = images.shape
    device, batch = images.device, min(budget.batch_size, n)
    per_epoch = n // batch  # the short rest of an epoch is dropped
    form = Stamp() if form is None else form
    v = form.start(num_starts, height, width, seed).to(device)
    per_start = (-1, *[1] * (v.ndim - 1))
    adam, lam = Adam(v, budget.betas), budget.cost.start(num_starts, device)
    alive = torch.arange(num_starts, device=device)
    best = torch.full((num_starts,), math.inf, device=device)
    kept = torch.zeros_like(v)
    reached = torch.zeros(num_starts, device=device)
    used = torch.zeros(num_starts, dtype=torch.int64, device=device)
    stale = torch.zeros(num_starts, dtype=torch.int64, device=device)
    path = torch.full((num_starts, budget.steps, 2), math.nan, device=device)
    order = torch.empty(0)
    epoch_reach = torch.zeros(num_starts, device=device)
    guard = guarded(device.type, torch.get_num_threads, torch.set_num_threads)
    with track(label, budget.steps) as advance:
        for step in range(budget.steps):
            epoch, at = divmod(step, per_epoch)
            if at == 0:
                order = _orders(alive, n, epoch, seed).to(device)
                epoch_reach = torch.zeros(len(alive), device=device)
            rows = order[:, at * batch : (at + 1) * batch]
            x = images[rows].float().div_(255)
            v.requires_grad_(True)
            stamped, size = form.apply(x, v)
            loss, reach = objective(stamped, alive, rows)
            total = loss + lam.cost.float() * (3 * height * width) * size
            (gradient,) = torch.autograd.grad(total.sum(), v)
            with torch.no_grad():
                size, reach = size.detach(), reach.detach()
                success = reach > budget.goal
                better = success & (size < best[alive])
                unfound = best[alive].isinf() & ~success
                keep = better | unfound
                kept[alive] = torch.where(keep.view(per_start), v.detach(), kept[alive])
                reached[alive] = torch.where(keep, reach, reached[alive])
                best[alive] = torch.where(better, size, best[alive])
                stale[alive] = torch.where(keep, 0, stale[alive] + 1)
                used[alive] += 1
                path[alive, step] = torch.stack([size, reach], dim=-1).float()
                epoch_reach += reach / per_epoch
                lam = budget.cost.after(lam, success)
                v = adam.step(v.detach(), gradient, budget.lr_at(step))
            last = at == per_epoch - 1
            if (last or step == budget.steps - 1) and not bool((v.isfinite().all() & reach.isfinite().all()).item()):
                raise CupelError(model, "gives NaN or infinite values", "check its weights and normalisation")
            if last and budget.patience is not None:
                running = ~((stale[alive] > budget.patience) & (epoch_reach > budget.goal))
                if not bool(running.all()):
                    alive, v, lam = alive[running], v[running], lam.at(running)
                    adam.keep(running)
                    if len(alive) == 0:
                        break
            if guard is not None:
                guard.step()
            advance(step + 1)
    found = best.isfinite()
    mask, pattern = form.picture(kept, height, width)
    return Inverted(
        mask=mask.cpu(),
        pattern=pattern.cpu(),
        size=torch.where(found, best, 1.0).cpu(),
        reach=reached.cpu(),
        found=found.cpu(),
        steps=used.cpu(),
        path=path[:, : int(used.max())].cpu(),
    )


def _orders(alive: Tensor, n: int, epoch: int, seed: Seed) -> Int[Tensor, "starts n"]:
    """A permutation of the images for each running start."""
    return torch.stack(
        [torch.randperm(n, generator=seed.child("order", start, epoch).torch()) for start in alive.tolist()]
    )
