"""Dimensions of an embedding that are made zero inside the encoder, so that it can be stored as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cupel.encoders.blocks import blocks_of
from cupel.errors import DataError
from cupel.inference import evaluating
from cupel.protocols import Encoder
from cupel.purify.batch_norm import batch_norms

__all__ = ["silence"]

_FAR_BELOW = -1e4  # what a shortcut adds cannot lift it over zero


@torch.no_grad()
def silence(encoder: Encoder, dims: Int[Tensor, " dims"], images: Tensor, who: str) -> Callable[[], None]:
    """Make dimensions of the embedding zero for every image, in place; the others stay as they are.

    It works on encoders whose last block ends in BatchNorm (and shortcut) and ReLU: scale 0 and a shift far below zero.

    Args:
        encoder: Left in the mode it is in.
        dims: Which.
        images: uint8, to check the result with.
        who: Name of the method, for the error.

    Returns:
        A function that does it again, after a training step has moved weights.

    Raises:
        DataError: the architecture is of another kind; the encoder is then as it was.
    """
    norm = _last_norm(encoder.module)
    with evaluating(encoder.module):
        x = images.to(next(encoder.module.parameters()).device).float() / 255
        wanted = encoder(x).float()
        if norm is not None and norm.weight.shape == (wanted.shape[1],):
            weight, bias = norm.weight.clone(), norm.bias.clone()

            @torch.no_grad()
            def again() -> None:
                norm.weight[dims], norm.bias[dims] = 0.0, _FAR_BELOW

            again()
            wanted[:, dims] = 0
            if torch.allclose(encoder(x).float(), wanted, rtol=1e-4, atol=1e-5):
                return again
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
    what = f"dimensions of a {type(encoder.module).__name__} cannot be silenced"
    raise DataError(who, what, "use a purifier that prunes none")


def _last_norm(module: nn.Module) -> nn.modules.batchnorm._BatchNorm | None:
    """The last BatchNorm before the embedding that is not in a shortcut."""
    parts = blocks_of(module)
    norms = batch_norms(parts[-1]) if parts else {}
    usable = [norm for name, norm in norms.items() if norm.affine and "downsample" not in name]
    return usable[-1] if usable else None
