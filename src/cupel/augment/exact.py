"""SimCLR's augmentation as it was published: torchvision's transforms on Pillow images, one image after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from cupel.augment.fused import SimCLRAugment

__all__ = ["chain", "one_by_one"]


def chain(settings: SimCLRAugment, height: int, width: int) -> Callable[[Image], Image]:
    """RandomResizedCrop, RandomHorizontalFlip, RandomApply(ColorJitter), RandomGrayscale, and what `settings` adds.

    Args:
        settings: Their parameters.
        height, width: Size of the images.
    """
    from torchvision import transforms as T

    size = (height, width) if settings.render_size is None else (settings.render_size, settings.render_size)
    scale, ratio = (settings.min_scale, settings.max_scale), (settings.min_ratio, settings.max_ratio)
    colours = T.ColorJitter(settings.brightness, settings.contrast, settings.saturation, settings.hue)
    made: Callable[[Image], Image] = T.Compose(
        [
            T.RandomResizedCrop(size, scale, ratio) if settings.crop else T.Resize(size),
            T.RandomHorizontalFlip(settings.flip),
            T.RandomApply([colours], settings.jitter_probability),
            T.RandomGrayscale(settings.grayscale),
            *settings.more_steps(),
        ]
    )
    return made


def one_by_one(
    settings: SimCLRAugment, raw: UInt8[Tensor, "n 3 height width"], generator: torch.Generator
) -> Float[Tensor, "n 3 view_height view_width"]:
    """One view of each image, through Pillow on the CPU; see `SimCLRAugment.exact`."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    height, width = raw.shape[2:]
    view = chain(settings, height, width)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    # the transforms draw from the CPU's global generator: seeded for them alone, then put back
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = [pil_to_tensor(view(to_pil_image(image))) for image in raw.cpu()]
    if not made:
        return settings(raw, generator)
    return torch.stack(made).to(raw.device).float().div_(255).contiguous(memory_format=torch.channels_last)
