"""Images that already bear the trigger, found by where a scanner's triggers send images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cupel.inference import features
from cupel.progress import say
from cupel.protocols import Encoder
from cupel.types import Dataset

__all__ = ["landed", "screened"]

_STAMPED = 512  # images that show where a trigger sends images
_BOOST = 2.0  # inverted triggers are fainter than those they stand for
_WAY = 0.85  # from the median of the images as they are (0) to where stamped images are (1)


def landed(embeddings: Float[Tensor, "n width"], stamped: Float[Tensor, "m width"], most: float) -> Bool[Tensor, " n"]:
    """Which images lie where stamped images lie, by the cosine with the mean direction of those.

    An image does from 85 % of the way on between the median of all images and where 95 % of the stamped ones are.

    Args:
        embeddings: Of the images, as they are.
        stamped: Of images with a trigger.
        most: Where more than this share of the images lies there, the place is no sign of a trigger: none is told.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, 0.0]])
        >>> landed(x, torch.tensor([[0.1, 1.0], [-0.1, 1.0]]), 0.25).tolist()
        [False, True, False, False]
        >>> landed(x, torch.tensor([[0.1, 1.0], [-0.1, 1.0]]), 0.2).tolist()
        [False, False, False, False]

    Source: our choice.
    """
    there = F.normalize(stamped, dim=1)
    centre = F.normalize(there.mean(dim=0), dim=0)
    near, end = F.normalize(embeddings, dim=1) @ centre, (there @ centre).quantile(0.05)
    found = near >= torch.lerp(near.median(), end, _WAY)
    return found if float(found.float().mean()) <= most else torch.zeros_like(found)


def screened(encoder: Encoder, clean: Dataset, triggers: tuple[Tensor, Tensor], most: float) -> Dataset:
    """The images without those that lie where one of the triggers sends images; a line says how many were left out.

    A purifier that holds the embeddings of its images would hold those of triggered ones too.

    Args:
        encoder: As given.
        clean: Images of its input size.
        triggers: Masks `[triggers, height, width]` and patterns `[triggers, 3, height, width]`.
        most: Largest share of the images that one trigger may take out; 0 = all images stay.
    """
    if not most:
        return clean
    plain = features(encoder, clean, dtype=torch.float32)
    some = clean.inputs[torch.arange(min(len(clean), _STAMPED))].float() / 255
    out = torch.zeros(len(clean), dtype=torch.bool, device=plain.device)
    for mask, pattern in zip(*(one.to(some.device) for one in triggers), strict=True):
        hit = torch.lerp(some, pattern, mask.mul(_BOOST).clamp(0, 1)).clamp(0, 1)
        out |= landed(plain, features(encoder, hit, dtype=torch.float32, store=False), most)
    if not bool(out.any()):
        return clean
    say(f"  {int(out.sum())} of {len(clean)} images lie where a trigger sends images; they are left out")
    return clean.subset((~out).nonzero().flatten().cpu())
