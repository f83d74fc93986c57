"""What every scanner checks before it says anything: are there images, and does the encoder answer them?"""

from __future__ import annotations

import torch
from torch import Tensor

from cupel.errors import CupelError, DataError
from cupel.inference import device_of, evaluating
from cupel.protocols import Encoder
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["LEAST_IMAGES", "LOOKED_AT", "admit", "inner_spread", "named", "some_rows"]

LEAST_IMAGES = 64
"""Different images that a scan needs at least (our choice)."""
LOOKED_AT = 64
"""Images that the encoder is tried on."""
_MOST_READ = 1024  # images whose pixels are compared
_NO_SPREAD = 1e-3  # the embeddings' deviation as a share of their length: float32 and bf16 round at 1e-7 and 4e-3


def admit(model: Encoder, clean: Dataset, min_images: int = LEAST_IMAGES) -> str | None:
    """Why nothing can be said about this model with these images; None = the scan may go on.

    Args:
        model: Encoder in any mode; left as it is.
        clean: Labels are not read.
        min_images: Different images, each of more than one colour, that are needed.

    Returns:
        A reason for the verdict `inconclusive`: too few images, too few different ones, images of one colour, or an
        encoder that gives the same embedding for all of them.

    Raises:
        CupelError: weights or embeddings are NaN or infinite.
        DataError: images of another size than the encoder's, or with pixels of 0 and 1 only.

    Source: our choice.
    """
    _check_size(model, clean)
    if len(clean) < min_images:
        return f"{len(clean)} images were given, at least {min_images} are needed"
    rows = _spread_rows(len(clean), _MOST_READ)
    pixels = clean.inputs[rows]
    _check_domain(pixels, clean)
    plain = pixels.flatten(1).amax(dim=1) == pixels.flatten(1).amin(dim=1)
    digests = clean.subset(rows).content()
    different = {one for one, flat in zip(digests, plain.tolist(), strict=True) if not flat}
    if len(different) < min(min_images, len(rows)):
        counted = f"the {len(rows)} images" + ("" if len(rows) == len(clean) else " looked at")
        what = f"{int(plain.sum())} show one colour only and the others repeat" if bool(plain.any()) else "they repeat"
        return f"{len(different)} of {counted} can be used, at least {min_images} are needed: {what}"
    _check_weights(model)
    z = _embed(model, pixels[_spread_rows(len(rows), LOOKED_AT)])
    if (spread := inner_spread(z)) < _NO_SPREAD:
        return f"the encoder gives the same embedding for all images (relative spread {spread:.1e})"
    return None


def inner_spread(z: Tensor) -> float:
    """Root mean square distance of embeddings from their mean, as a share of their root mean square length.

    Whatever the scale or rotation of the features; 0 where all are zero.

    Example:
        >>> inner_spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), inner_spread(torch.ones(3, 2))
        (1.0, 0.0)
    """
    z = z.double()
    length = z.square().sum(dim=1).mean().sqrt()
    distance = (z - z.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    return float(distance / length) if float(length) > 0 else 0.0


def some_rows(clean: Dataset, most: int, seed: Seed) -> Tensor:
    """At most `most` rows in random order."""
    return torch.randperm(len(clean), generator=seed.child("images").torch())[:most]


def named(model: object) -> str:
    """What to call a model in an error."""
    return str(getattr(model, "name", type(model).__name__))


def _spread_rows(n: int, most: int) -> Tensor:
    """At most `most` of n rows, evenly spread: a sorted folder shows all its classes."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()


def _check_size(model: Encoder, clean: Dataset) -> None:
    shape, side = list(clean.inputs.shape), model.input_size
    if shape[2:] != [side, side]:
        what = f"images are {shape[2]}×{shape[3]}, the encoder takes {side}×{side}"
        raise DataError(clean.name, what, "resize them first")


def _check_domain(pixels: Tensor, clean: Dataset) -> None:
    if int(pixels.amax()) == 1:
        what = "no pixel is above 1 of 255"
        raise DataError(
            clean.name, what, "images that were scaled to [0, 1] must be turned back into uint8 of 0 to 255"
        )


def _check_weights(model: Encoder) -> None:
    for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CupelError(
                named(model), f"'{name}' holds NaN or infinite values", "get an intact copy of the weights"
            )


@torch.no_grad()
def _embed(model: Encoder, pixels: Tensor) -> Tensor:
    """float32 embeddings, by the model as it is."""
    with evaluating(model.module):
        z = model(pixels.to(device_of(model.module)).float() / 255)
    if not bool(z.isfinite().all()):
        raise CupelError(named(model), "gives NaN or infinite embeddings", "check its weights and normalisation")
    return z.float()
