"""What a defence takes: images that went through an encoder, and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cupel.scan.passes import peak_memory_mib

__all__ = ["Cost", "counting"]


class Cost:
    """Images that entered a network's first layer, in all and with gradients; see `counting`."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def to_json(self) -> dict[str, float | None]:
        """The counts, and the most memory the process held until now (MiB; None = the system does not tell)."""
        peak = peak_memory_mib(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return {"forward_images": self.forward, "backward_images": self.backward, "peak_memory_mib": peak}


@contextlib.contextmanager
def counting() -> Iterator[Cost]:
    """Count every image that enters a convolution of three channels, which is where the encoders begin.

    Copies, folded encoders and functional calls are counted too. An image counts as backward where its pass keeps a
    graph, whether that is used or not.

    Example:
        >>> with counting() as cost:
        ...     _ = nn.Conv2d(3, 4, 3)(torch.zeros(5, 3, 8, 8))
        >>> cost.forward, cost.backward
        (5, 5)
    """
    cost = Cost()

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            cost.forward += len(inputs[0])
            cost.backward += len(inputs[0]) if output.requires_grad else 0

    handle = nn.modules.module.register_module_forward_hook(seen)
    try:
        yield cost
    finally:
        handle.remove()
