"""Blocks of an encoder, from the images to the embedding, and what they give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["block_outputs", "blocks_of"]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Parts of an encoder's backbone that have weights, from the images to the embedding.

    A convolution and the BatchNorm after it outside of the residual stages count as two.

    Example:
        >>> from cupel.encoders import Fast
        >>> from cupel.seeds import Seed
        >>> [type(part).__name__ for part in blocks_of(Fast(width=4).build(Seed(0)).module)]
        ['Conv2d', 'BatchNorm2d', 'BasicBlock', 'BasicBlock', 'BasicBlock']
    """
    backbone = getattr(module, "backbone", module)
    return [part for part in backbone.children() if any(True for _ in part.parameters())]


@contextmanager
def block_outputs(module: nn.Module, index: int) -> Iterator[list[Tensor]]:
    """Inside the `with`, a list of what block `index` gave in each forward pass; gradients flow through it.

    An activation that works in place on a block's output changes what the list holds, so behind a bare BatchNorm it is
    what comes after the ReLU.

    Args:
        module: As for `blocks_of`.
        index: Counts from 0 at the images; negative from the embedding.

    Example:
        >>> import torch
        >>> from cupel.encoders import Fast
        >>> from cupel.seeds import Seed
        >>> encoder = Fast(width=4).build(Seed(0))
        >>> with block_outputs(encoder.module, -1) as seen:
        ...     h = encoder(torch.zeros(2, 3, 32, 32))
        >>> tuple(seen[0].shape), torch.equal(seen[0].mean(dim=(2, 3)), h)
        ((2, 16, 4, 4), True)
    """
    seen: list[Tensor] = []
    hook = blocks_of(module)[index].register_forward_hook(lambda part, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()
