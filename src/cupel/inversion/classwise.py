"""The smallest trigger towards each class of a classifier, as Neural Cleanse searches for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from cupel.errors import CupelError
from cupel.inversion.invert import Adam, Inverted, random_start
from cupel.inversion.stamping import squash, stamp
from cupel.progress import track
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.threads import guarded

__all__ = ["ClassSearch", "Cost", "invert_classes"]

_PASS = 512  # images per forward pass: more of them leave the caches


class Cost(NamedTuple):
    """Weight λ of the mask's size with its counters; each `[searches]`.

    Args:
        cost: λ ≥ 0.
        waited: Successes in a row while λ was 0.
        up, down: Length of the current run of successes, of failures.
        raised, lowered: λ has been raised, lowered, since it was first set.
    """

    cost: Float[Tensor, " searches"]
    waited: Int[Tensor, " searches"]
    up: Int[Tensor, " searches"]
    down: Int[Tensor, " searches"]
    raised: Bool[Tensor, " searches"]
    lowered: Bool[Tensor, " searches"]

    @staticmethod
    def start(n: int, device: torch.device | str = "cpu") -> Cost:
        """λ = 0 for n searches."""
        count = torch.zeros(n, dtype=torch.int64, device=device)
        no = torch.zeros(n, dtype=torch.bool, device=device)
        return Cost(torch.zeros(n, dtype=torch.float64, device=device), count, count, count, no, no)

    def at(self, rows: Tensor) -> Cost:
        """Only the given searches."""
        return Cost(*(one[rows] for one in self))


@settings
class ClassSearch:
    """How the smallest trigger towards a class is searched for.

    A step is a pass over `images_per_step` images in batches; success is judged once a step, by its means.

    Args:
        steps: At most.
        batch_size: Images per class and batch.
        images_per_step: Drawn anew for each step; None = all.
        num_starts: Random starts per class; the smallest mask counts.
        lr: Of Adam with β = (0.5, 0.9).
        success: Share of stamped images taken for the class at which a step succeeds.
        cost: λ once a trigger works; before that λ = 0.
        cost_factor: u: λ is multiplied by it after `patience` successes in a row, divided by u^1.5 after as many
            failures.
        patience: See above.
        stop_after: A search stops after so many steps without a smaller mask once λ was both raised and lowered;
            None = never.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, and its code.
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    images_per_step: PositiveInt | None = 1000
    num_starts: PositiveInt = 1
    lr: Positive = 0.1
    success: Fraction = 0.99
    cost: Positive = 1e-3
    cost_factor: Annotated[float, Field(gt=1)] = 2.0
    patience: PositiveInt = 5
    stop_after: PositiveInt | None = 25

    revision: ClassVar[int] = 1

    def after(self, state: Cost, success: Bool[Tensor, " searches"]) -> Cost:
        """λ and its counters after one step.

        Example:
            >>> search, state = ClassSearch(), Cost.start(1)
            >>> for _ in range(9):
            ...     state = search.after(state, torch.tensor([True]))
            >>> float(state.cost)
            0.002
        """
        waited = torch.where((state.cost == 0) & success, state.waited + 1, 0)
        begins = (state.cost == 0) & (waited >= self.patience)
        cost = torch.where(begins, self.cost, state.cost)
        # the step that sets λ clears the counters first and counts itself afterwards, as in the authors' code
        up = torch.where(success, torch.where(begins, 0, state.up) + 1, 0)
        down = torch.where(success, 0, torch.where(begins, 0, state.down) + 1)
        up_now, down_now = up >= self.patience, down >= self.patience
        cost = torch.where(up_now, cost * self.cost_factor, cost)
        cost = torch.where(down_now, cost / self.cost_factor**1.5, cost)
        return Cost(
            cost,
            waited,
            torch.where(up_now, 0, up),
            torch.where(down_now, 0, down),
            (state.raised & ~begins) | up_now,
            (state.lowered & ~begins) | down_now,
        )


def invert_classes(
    classify: Callable[[Tensor], Tensor],
    images: UInt8[Tensor, "n 3 height width"],
    classes: Int[Tensor, " k"],
    search: ClassSearch,
    seed: Seed,
    label: str = "neural_cleanse",
    model: str = "classifier",
) -> Inverted:
    """For each class the smallest mask whose pattern sends images to it.

    Minimises CE(classify((1 − m) x + m Δ), y) + λ ‖m‖₁, m over height × width, by Adam. All classes and starts share
    each batch of images and the forward passes, but nothing else.

    Args:
        classify: Images in [0, 1] → logits; its weights must need no gradient.
        images: Clean, on the device of the classifier. Their labels do not matter.
        classes: int64, columns of the logits.
        search: Settings.
        seed: Start values and order.
        label: For the progress display.
        model: Name of the model, for errors.

    Returns:
        One entry per class, in order; `size` is ‖m‖₁ as a share of height × width, `steps` those of all starts.

    Raises:
        CupelError: the loss is not finite.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section IV and its code.
    Deviations: all classes see the same images in a step (the code shuffles for each class); several starts.
    """
    n, _, height, width = images.shape
    device, batch, starts = images.device, min(search.batch_size, n), search.num_starts
    batches = max(1, min(n, search.images_per_step or n) // batch)
    targets = classes.to(device).repeat_interleave(starts)
    total, per_pass = len(targets), max(1, _PASS // batch)
    v = random_start(total, height, width, seed).to(device)
    adam, state = Adam(v, (0.5, 0.9)), Cost.start(total, device)
    alive = torch.arange(total, device=device)
    best = torch.full((total,), math.inf, device=device)
    kept, reached, stale, used = (
        squash(v),
        torch.zeros(total, device=device),
        torch.zeros(total, dtype=torch.int64, device=device),
        torch.zeros(total, dtype=torch.int64, device=device),
    )
    guard = guarded(device.type, torch.get_num_threads, torch.set_num_threads)
    with torch.enable_grad(), track(label, search.steps) as advance:
        for step in range(search.steps):
            order = torch.randperm(n, generator=seed.child("order", step).torch()).to(device)
            hits, sizes = torch.zeros(len(alive), device=device), torch.zeros(len(alive), device=device)
            for rows in torch.split(order[: batches * batch], batch):
                x = images[rows].float().div_(255)
                slopes = []
                for some in torch.split(torch.arange(len(alive), device=device), per_pass):
                    y = targets[alive[some]].repeat_interleave(batch)
                    w = v[some].requires_grad_(True)
                    trigger = squash(w)
                    logits = classify(stamp(x, trigger[:, None, :1], trigger[:, None, 1:]).flatten(0, 1)).float()
                    loss = cross_entropy(logits, y, reduction="none").view(len(some), batch).mean(dim=1)
                    size = trigger[:, 0].sum(dim=(1, 2))
                    (slope,) = torch.autograd.grad((loss + state.cost[some].float() * size).sum(), w)
                    slopes.append(slope)
                    hits[some] += (logits.detach().argmax(1) == y).float().view(len(some), batch).mean(dim=1)
                    sizes[some] += size.detach() / (height * width)
                v = adam.step(v.detach(), torch.cat(slopes), search.lr)
            with torch.no_grad():
                hits, sizes = hits / batches, sizes / batches
                success = hits >= search.success
                better = success & (sizes < best[alive])
                keep = better | (best[alive].isinf() & ~success)
                stale[alive] = torch.where(better, 0, stale[alive] + 1)
                kept[alive] = torch.where(keep[:, None, None, None], squash(v), kept[alive])
                reached[alive] = torch.where(keep, hits, reached[alive])
                best[alive] = torch.where(better, sizes, best[alive])
                used[alive] += 1
                state = search.after(state, success)
            if not bool(v.isfinite().all()):
                raise CupelError(model, "gives NaN or infinite values", "check its weights and normalisation")
            if search.stop_after is not None:
                tried = state.raised & state.lowered & best[alive].isfinite()
                running = ~(tried & (stale[alive] >= search.stop_after))
                if not bool(running.all()):
                    alive, v, state = alive[running], v[running], state.at(running)
                    adam.keep(running)
            if guard is not None:
                guard.step()
            advance(step + 1, found=float(best.isfinite().float().mean()))
            if len(alive) == 0:
                break
    least = best.view(-1, starts).argmin(dim=1)  # the first start where none was found
    chosen = torch.arange(len(classes), device=device) * starts + least
    found = best[chosen].isfinite()
    return Inverted(
        mask=kept[chosen, 0].cpu(),
        pattern=kept[chosen, 1:].cpu(),
        size=torch.where(found, kept[chosen, 0].mean(dim=(1, 2)), 1.0).cpu(),
        reach=reached[chosen].cpu(),
        found=found.cpu(),
        steps=used.view(-1, starts).sum(dim=1).cpu(),
    )
