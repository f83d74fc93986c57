"""`torch.compile` that never stands in the way: where it fails, the network runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cupel.progress import say

__all__ = ["Compiled"]


class Compiled:
    """A network compiled at its first call; the same parameters, buffers and names, for the network itself stays.

    The first call is rehearsed, forward and backward, because a compiler may fail at either; BatchNorm's statistics are
    put back afterwards. If it fails, the user is told in one line, and `network` is called uncompiled from then on.

    Args:
        network: Trained elsewhere; shared, not copied.
        backend: Of `torch.compile`.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> Compiled(net, backend="eager")(torch.zeros(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
        self.network, self.backend = network, backend
        self.chosen: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the network makes of `x`."""
        if self.chosen is None:
            self.chosen = self._compiled(x)
        return self.chosen(x)

    def _compiled(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        buffers = [(one, one.clone()) for one in self.network.buffers()]
        weights = [one for one in self.network.parameters() if one.requires_grad]
        try:
            fast: Callable[[Tensor], Tensor] = torch.compile(self.network, backend=self.backend, dynamic=False)
            with torch.enable_grad():
                torch.autograd.grad(fast(x.detach()).sum(), weights, allow_unused=True)
        except Exception as error:  # compilers raise whatever they like; none of it matters to the result
            reason = " ".join(str(error).split())[:160]
            say(f"  torch.compile failed ({type(error).__name__}: {reason}); going on without it")
            return self.network
        finally:
            with torch.no_grad():
                for one, before in buffers:
                    one.copy_(before)
        return fast
