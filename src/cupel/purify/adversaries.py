"""Stand-ins for triggered images: perturbations found by gradient ascent, and boosted inverted triggers.

All kinds of perturbation have one form, `x ↦ clip(keep · x + v, 0, 1)` with `low ≤ v ≤ high`, so that one batched
ascent finds them together. Images may share a `v` (universal perturbations, shared patches).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cupel.protocols import Images

__all__ = [
    "Search",
    "applied",
    "ascend",
    "boosted",
    "joined",
    "linf_search",
    "patch_search",
    "shared_search",
    "windows",
]


class Search(NamedTuple):
    """Where each image's perturbation may lie, and where the ascent begins.

    Args:
        keep: `[batch, 1, height, width]`, 1 = the image is seen, 0 = it is replaced.
        slot: int64 `[batch]`, which of the variables an image uses.
        start, low, high: `[slots, 3, height, width]`, first value and bounds of the variables.
        rate: `[slots, 1, 1, 1]`, size of one step.
    """

    keep: Float[Tensor, "batch 1 height width"]
    slot: Int[Tensor, " batch"]
    start: Float[Tensor, "slots 3 height width"]
    low: Float[Tensor, "slots 3 height width"]
    high: Float[Tensor, "slots 3 height width"]
    rate: Float[Tensor, "slots 1 1 1"]


def linf_search(x: Images, epsilon: float, rate: float, generator: torch.Generator) -> Search:
    """Each image its own δ with ‖δ‖∞ ≤ ε and 0 ≤ x + δ ≤ 1, from a random start in that box.

    Args:
        x: Clean images in [0, 1].
        epsilon: Radius, in [0, 1].
        rate: Step size.
        generator: On the device of the images.

    Source: Madry et al., ICLR 2018, arXiv:1706.06083.
    """
    u = torch.rand(x.shape, generator=generator, device=x.device)
    low, high = (-x).clamp(min=-epsilon), (1 - x).clamp(max=epsilon)
    start = torch.clamp((2 * u - 1) * epsilon, low, high)
    keep = x.new_ones(len(x), 1, *x.shape[2:])
    return Search(keep, torch.arange(len(x), device=x.device), start, low, high, _rates(x, len(x), rate))


def shared_search(x: Images, delta: Float[Tensor, "3 height width"], epsilon: float, rate: float) -> Search:
    """One δ with ‖δ‖∞ ≤ ε for all images, from where an earlier search ended; x + δ is clipped to [0, 1].

    Source: Moosavi-Dezfooli et al., Universal adversarial perturbations, CVPR 2017, for the idea of one δ for all.
    """
    start = delta[None].clamp(-epsilon, epsilon)
    bound = torch.full_like(start, epsilon)
    keep = x.new_ones(len(x), 1, *x.shape[2:])
    slot = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return Search(keep, slot, start, -bound, bound, _rates(x, 1, rate))


def patch_search(
    x: Images, sides: tuple[float, float], rate: float, num_patches: int | None, generator: torch.Generator
) -> Search:
    """Square windows at random places whose content is free in [0, 1]; outside of them nothing changes.

    Every other patch starts from one random colour, the rest from noise (our choice).

    Args:
        x: Clean images in [0, 1].
        sides: Smallest and largest side of a window, as shares of the image's side.
        rate: Step size.
        num_patches: Different patches (place and content) dealt to the images in turn; None = one for each image.
        generator: On the device of the images.
    """
    n = len(x) if num_patches is None else min(num_patches, len(x))
    window = windows(n, x.shape[2], x.shape[3], sides, generator)[:, None].float()
    noise = torch.rand(n, *x.shape[1:], generator=generator, device=x.device)
    colour = torch.rand(n, x.shape[1], 1, 1, generator=generator, device=x.device)
    plain = torch.arange(n, device=x.device).view(-1, 1, 1, 1) % 2 == 0  # real patches are often of one colour
    start = torch.where(plain, colour, noise) * window
    slot = torch.arange(len(x), device=x.device) % max(n, 1)
    high = window.expand_as(start)
    return Search(1 - window[slot], slot, start, torch.zeros_like(start), high, _rates(x, n, rate))


def windows(
    n: int, height: int, width: int, sides: tuple[float, float], generator: torch.Generator
) -> Bool[Tensor, "n height width"]:
    """Random squares that lie wholly inside the image; the side is uniform in `sides`, rounded to 1 pixel or more.

    Args:
        n: How many.
        height, width: Of the image.
        sides: Smallest and largest side, as shares of the shorter side of the image.
        generator: Source of randomness, on the device wanted.
    """
    u, top, left = torch.rand(3, n, generator=generator, device=generator.device)
    side = ((sides[0] + (sides[1] - sides[0]) * u) * min(height, width)).round().clamp(min=1)
    return _inside(top, side, height)[:, :, None] & _inside(left, side, width)[:, None, :]


def _inside(place: Tensor, side: Tensor, length: int) -> Tensor:
    first = (place * (length - side + 1)).floor().clamp(max=length - side)  # float32 may round up to the end
    at = torch.arange(length, device=place.device)
    return (at >= first[:, None]) & (at < (first + side)[:, None])


def _rates(x: Tensor, n: int, rate: float) -> Tensor:
    return torch.full((n, 1, 1, 1), rate, device=x.device)


def joined(searches: Sequence[Search]) -> Search:
    """Several searches as one, their images one after the other; no variable is shared between them."""
    offset, slots = 0, []
    for search in searches:
        slots.append(search.slot + offset)
        offset += len(search.start)
    parts = [
        torch.cat(part)
        for part in zip(*(s._replace(slot=new) for s, new in zip(searches, slots, strict=True)), strict=True)
    ]
    return Search(*parts)


def applied(x: Images, search: Search, v: Float[Tensor, "slots 3 height width"]) -> Images:
    """The perturbed images, in [0, 1]; gradients flow to `v`."""
    return (search.keep * x + v[search.slot]).clamp(0, 1)


def ascend(
    objective: Callable[[Images], Float[Tensor, ""]], x: Images, search: Search, steps: int
) -> Float[Tensor, "slots 3 height width"]:
    """Projected gradient ascent with signs: v ← Π( v + rate · sign ∇ objective ).

    Args:
        objective: Scalar of the perturbed images, to be made large. Gradients are taken for `v` alone: weights collect
            none.
        x: Clean images.
        search: Start and bounds.
        steps: Number of steps, ≥ 0.

    Returns:
        The variables after the last step, detached.

    Source: Madry et al., ICLR 2018, arXiv:1706.06083, eq. on p. 4.
    """
    v = search.start.detach()
    for _ in range(steps):
        with torch.enable_grad():
            v = v.requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(applied(x, search, v)), v)
        v = torch.clamp(v.detach() + search.rate * gradient.sign(), search.low, search.high)
    return v


def boosted(
    masks: Float[Tensor, "triggers height width"],
    patterns: Float[Tensor, "triggers 3 height width"],
    n: int,
    generator: torch.Generator,
    *,
    boost: tuple[float, float] = (0.7, 3.0),
    shift: int = 2,
    dilation: int = 1,
) -> tuple[Float[Tensor, "n 1 height width"], Float[Tensor, "n 3 height width"]]:
    """Masks and patterns for n images: inverted triggers made stronger, larger and shifted at random.

    An inversion ends with the faintest trigger that works; a purifier trained on exactly that silences it and leaves
    the real one. So each image gets one of the triggers with m' = clip(a·m, 0, 1), a uniform in `boost`; the mask is
    grown by 0 to `dilation` pixels; mask and pattern are moved together by up to `shift` pixels. Patterns are kept.

    Args:
        masks, patterns: In [0, 1].
        n: Images to serve; triggers are drawn uniformly.
        generator: On the device of the masks.
        boost: Smallest and largest a.
        shift: Largest move along each axis, in pixels ≥ 0; what leaves the image is lost.
        dilation: Largest growth in pixels ≥ 0.

    Source: our choice.
    """
    _, height, width = masks.shape
    device = masks.device

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (n,), generator=generator, device=device)

    which, grow = integers(0, len(masks) - 1), integers(0, dilation)
    a = boost[0] + (boost[1] - boost[0]) * torch.rand(n, generator=generator, device=device)
    grown = [masks[:, None]]
    for _ in range(dilation):
        grown.append(F.max_pool2d(grown[-1], 3, stride=1, padding=1))
    mask = (torch.stack(grown)[grow, which] * a[:, None, None, None]).clamp(0, 1)
    both = F.pad(torch.cat([mask, patterns[which]], dim=1), [shift] * 4)
    rows = torch.arange(height, device=device) + integers(0, 2 * shift)[:, None]
    columns = torch.arange(width, device=device) + integers(0, 2 * shift)[:, None]
    image, channel = torch.arange(n, device=device)[:, None, None, None], torch.arange(4, device=device)[:, None, None]
    moved = both[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return moved[:, :1], moved[:, 1:]
