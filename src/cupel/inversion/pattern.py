"""The pattern inside a given mask that makes a model do something: by Adam, or by steps of a set size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cupel.errors import CupelError
from cupel.inversion.invert import Adam, random_start
from cupel.inversion.stamping import squash, stamp
from cupel.progress import track
from cupel.seeds import Seed
from cupel.threads import guarded

__all__ = ["Learned", "learn_pattern", "step_sizes", "stepped"]

_LOOK_EVERY = 20  # steps between reads of the cost: each read waits for the device


@dataclass(frozen=True)
class Learned:
    """A pattern and how it came about.

    Args:
        pattern: uint8 `[3, height, width]` on the CPU, 0 outside of the mask.
        costs: The cost of each step, before it.
    """

    pattern: UInt8[Tensor, "3 height width"]
    costs: list[float]


def learn_pattern(
    cost: Callable[[Tensor, Tensor, Seed], Tensor],
    images: UInt8[Tensor, "n 3 height width"],
    mask: Float[Tensor, "height width"],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    betas: tuple[float, float],
    seed: Seed,
    label: str = "trigger",
) -> Learned:
    """Minimise the mean cost of stamped images over the pattern; the mask is given.

    Δ = tanh(w)/(2 − ε) + ½,  x' = (1 − m) x + m Δ,  w by Adam on cost(x'), from a Δ that is uniform in (0, 1)

    Args:
        cost: `cost(stamped, rows, seed)` → a scalar; stamped in [0, 1], rows int64 of `images`, and the step's seed.
            It runs the model, which must be `frozen`.
        images: On the device of the model.
        mask: In [0, 1].
        steps: Batches; each pass goes through a permutation, its short rest is dropped.
        batch_size: Images per batch; all of them where there are fewer.
        lr, betas: Adam's.
        seed: Start and order.
        label: For the progress display.

    Raises:
        CupelError: the cost is not finite.

    Source: step 3 of Yao et al., Latent Backdoor, CCS 2019, arXiv:1905.10447, in the parametrisation of its code.
    """
    n, _, height, width = images.shape
    device, batch = images.device, min(batch_size, n)
    w = random_start(1, height, width, seed)[0, 1:].to(device)
    mask = mask.to(device)
    adam, costs, per_pass = Adam(w, betas), list[Tensor](), n // batch
    guard = guarded(device.type, torch.get_num_threads, torch.set_num_threads)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad(), track(label, steps) as advance:
        for step in range(steps):
            turn, at = divmod(step, per_pass)
            if at == 0:
                order = torch.randperm(n, generator=seed.child("order", turn).torch()).to(device)
            rows = order[at * batch : (at + 1) * batch]
            w.requires_grad_(True)
            stamped = stamp(images[rows].float().div_(255), mask, squash(w))
            value = cost(stamped, rows, seed.child("step", step))
            (slope,) = torch.autograd.grad(value, w)
            w = adam.step(w.detach(), slope, lr)
            costs.append(value.detach())
            if guard is not None:
                guard.step()
            if (step + 1) % _LOOK_EVERY == 0 or step + 1 == steps:
                _finite(costs[-1], label)
                advance(step + 1, cost=float(costs[-1]))
    pattern = (squash(w) * 255).round().to(torch.uint8)
    covered = torch.where(mask > 0, pattern, torch.zeros_like(pattern))
    return Learned(covered.cpu(), torch.stack(costs).float().tolist() if costs else [])


def step_sizes(*phases: tuple[int, float, float]) -> list[float]:
    """Step sizes of consecutive phases, each (steps, size at its start, size at its end), linear in between.

    Example:
        >>> step_sizes((2, 6.0, 6.0), (3, 6.0, 3.0))
        [6.0, 6.0, 6.0, 4.5, 3.0]
    """
    return [a + (b - a) * i / max(1, n - 1) for n, a, b in phases for i in range(n)]


def stepped(
    cost: Callable[[Tensor], Tensor],
    start: Float[Tensor, "n 3 height width"],
    sizes: Sequence[float],
    *,
    mask: Float[Tensor, "height width"] | None = None,
    smooth: Callable[[Tensor, float], Tensor] | None = None,
    label: str = "pictures",
) -> tuple[Float[Tensor, "n 3 height width"], Float[Tensor, "steps n"]]:
    """Pictures by gradient steps of a set size, each picture on its own.

    x ← P(x − s · m · g / mean|g|) with g = ∂cost/∂x, the mean over the picture's pixels inside of the mask; P cuts to
    [0, 1], and `smooth`, if given, comes after it.

    Args:
        cost: Pictures in [0, 1] → one cost each; it runs the model, which must be frozen.
        start: x at the beginning, left as it is.
        sizes: s of each step, for pixels in [0, 1].
        mask: m, 1 where pixels may change; None = all may.
        smooth: Takes the pictures and the share of the steps that are done, in [0, 1].
        label: For the progress display.

    Returns:
        The last pictures, and the cost of each before each step.

    Raises:
        CupelError: a cost is not finite.

    Source: the authors' code of Liu et al., Trojaning Attack on Neural Networks, NDSS 2018.
    """
    x = start.clone()
    m = torch.ones(start.shape[-2:], device=x.device) if mask is None else mask.to(x)
    pixels, costs = 3 * m.sum(), list[Tensor]()
    with torch.enable_grad(), track(label, len(sizes)) as advance:
        for step, size in enumerate(sizes):
            x.requires_grad_(True)
            values = cost(x)
            (slope,) = torch.autograd.grad(values.sum(), x)
            with torch.no_grad():
                slope = slope * m
                length = slope.abs().sum(dim=(1, 2, 3), keepdim=True) / pixels
                x = (x.detach() - size * slope / length.clamp_min(1e-30)).clamp_(0, 1)
                if smooth is not None:
                    x = smooth(x, step / max(1, len(sizes) - 1))
            costs.append(values.detach())
            if (step + 1) % _LOOK_EVERY == 0 or step + 1 == len(sizes):
                _finite(costs[-1], label)
                advance(step + 1, cost=float(costs[-1].mean()))
    return x, torch.stack(costs) if costs else x.new_zeros(0, len(x))


def _finite(cost: Tensor, label: str) -> None:
    if not bool(cost.isfinite().all()):
        raise CupelError(label, "the cost is not finite", "check the encoder's weights and normalisation")
