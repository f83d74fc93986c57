"""What a defence takes: images that went through an encoder, and memory."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["Cost", "counting", "peak_memory_mib"]


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory that this process has held so far, in MiB: on a GPU what torch allocated there, else its
    resident size; None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))):
        return int(found[1]) / 2**10
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Cost:
    """Images that entered a network's first layer, in all and with gradients; see `counting`."""

    def __init__(self, forward: int = 0, backward: int = 0) -> None:
        self.forward, self.backward = forward, backward

    @staticmethod
    def of(parts: Sequence[Cost]) -> Cost:
        """Several as one."""
        return Cost(sum(one.forward for one in parts), sum(one.backward for one in parts))

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
        conv = module.conv if hasattr(module, "weight_and_bias") else module  # as `FoldedConv`, which lies above
        # the alarm of a gated encoder sees the same images again, and has no parameters
        first = isinstance(conv, nn.Conv2d) and conv.in_channels == 3 and any(True for _ in conv.parameters())
        if first:
            cost.forward += len(inputs[0])
            cost.backward += len(inputs[0]) if output.requires_grad else 0

    handle = nn.modules.module.register_module_forward_hook(seen)
    try:
        yield cost
    finally:
        handle.remove()
