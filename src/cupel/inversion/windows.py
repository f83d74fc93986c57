"""The content of many small windows that makes a model do something, each window on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cupel.progress import track
from cupel.seeds import Seed
from cupel.threads import guarded

__all__ = ["fill_windows", "paste", "window_corners"]

_TOGETHER = 512  # images of a pass: more of them leave the caches


def window_corners(height: int, width: int, side: int, stride: int) -> Int[Tensor, "windows 2"]:
    """Top and left of every window, row by row; the last ones touch the far edges.

    Example:
        >>> window_corners(5, 4, 2, 2).tolist()
        [[0, 0], [0, 2], [2, 0], [2, 2], [3, 0], [3, 2]]
    """
    tops, lefts = (sorted({*range(0, n - side, stride), n - side}) for n in (height, width))
    return torch.tensor([(top, left) for top in tops for left in lefts])


def paste(
    x: Float[Tensor, "batch 3 height width"],
    content: Float[Tensor, "windows 3 side side"],
    corners: Int[Tensor, "windows 2"],
) -> Float[Tensor, "windows batch 3 height width"]:
    """Every image with every window's content in its place; gradients flow to the contents."""
    side = content.shape[-1]
    out = x.expand(len(corners), *x.shape).clone()
    for i, (top, left) in enumerate(corners.tolist()):
        out[i, :, :, top : top + side, left : left + side] = content[i]
    return out


def fill_windows(
    reach: Callable[[Tensor], Tensor],
    images: UInt8[Tensor, "n 3 height width"],
    corners: Int[Tensor, "windows 2"],
    side: int,
    sizes: Sequence[float],
    batch_size: int,
    seed: Seed,
    label: str = "windows",
) -> Float[Tensor, "windows 3 side side"]:
    """Raise what a window's content does to images that bear it, by steps along the sign of the gradient.

    p ← cut(p + s · sign(∂ reach(x with p in the window) / ∂p)),  cut to [0, 1]

    Args:
        reach: Images with a window each, `[windows, batch, 3, height, width]` in [0, 1] → one number per window. It
            runs the model, which must be frozen.
        images: Clean, on the device of the model.
        corners: As `window_corners` gives them.
        side: Of the windows in pixels.
        sizes: s of each step.
        batch_size: Images per window and step, the same ones for all windows; all where there are fewer.
        seed: First contents and order of the images.
        label: For the progress display.

    Source: our choice.
    """
    n, device, batch = len(images), images.device, min(batch_size, len(images))
    starts = [torch.rand(3, side, side, generator=seed.child("start", i).torch()) for i in range(len(corners))]
    contents = torch.stack(starts).to(device)
    groups = torch.split(torch.arange(len(corners)), max(1, _TOGETHER // batch))
    guard = guarded(device.type, torch.get_num_threads, torch.set_num_threads)
    with torch.enable_grad(), track(label, len(groups) * len(sizes)) as advance:
        for number, some in enumerate(groups):
            p = contents[some]
            for step, size in enumerate(sizes):
                order = torch.randperm(n, generator=seed.child("order", step).torch())[:batch]
                x = images[order.to(device)].float().div_(255)
                p.requires_grad_(True)
                (slope,) = torch.autograd.grad(reach(paste(x, p, corners[some])).sum(), p)
                p = (p.detach() + size * slope.sign()).clamp_(0, 1)
                if guard is not None:
                    guard.step()
                advance(number * len(sizes) + step + 1)
            contents[some] = p
    return contents
