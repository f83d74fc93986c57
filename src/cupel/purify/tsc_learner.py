"""What TSC trains: a network by NT-Xent, or the middle of a curve of networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cupel.losses.contrastive import nt_xent
from cupel.losses.pulling import spread
from cupel.protocols import Batch

if TYPE_CHECKING:
    from cupel.purify.tsc import TSC

__all__ = ["CurveLearner", "TuningLearner", "along", "middle"]

State = Mapping[str, Tensor]


def along(t: float | Tensor, a: State, c: State, b: State) -> dict[str, Tensor]:
    """γ(t) = (1−t)² a + 2t(1−t) c + t² b, for the entries of `c`; exactly `a` at 0 and `b` at 1.

    Example:
        >>> a, c, b = ({"w": torch.tensor([value])} for value in (0.0, 4.0, 2.0))
        >>> float(along(0.5, a, c, b)["w"])
        2.5

    Source: Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018,
    arXiv:1802.10026.
    """
    return {name: (1 - t) ** 2 * a[name] + 2 * t * (1 - t) * value + t**2 * b[name] for name, value in c.items()}


def middle(a: State, b: State) -> dict[str, Tensor]:
    """(a + b) / 2, which makes the curve a straight line."""
    return {name: (value + b[name]) / 2 for name, value in a.items()}


class TuningLearner:
    """Encoder and projector under NT-Xent of two views.

    Args:
        settings: Of the method.
        network: Encoder, then projector.
        trained: Only weights whose names begin so.
    """

    def __init__(self, settings: TSC, network: nn.Sequential, trained: str = "") -> None:
        self.settings, self.network = settings, network
        self.state: nn.Module = network.train()
        if trained:  # the encoder's BatchNorms stand still with it
            network[0].eval()
        for name, weight in network.named_parameters():
            weight.requires_grad_(name.startswith(trained))

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [one for one in self.network.parameters() if one.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """NT-Xent, and the spread of the projections."""
        return self.contrast(batch, dict(self.network.named_parameters()))

    def contrast(self, batch: Batch, weights: State) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss with other weights in the network."""
        draw = batch.seed.child("views").torch(batch.inputs.device)
        views = self.settings.augment(batch.inputs.repeat(2, 1, 1, 1), draw)
        z = functional_call(self.network, dict(weights), views.contiguous(memory_format=torch.channels_last)).float()
        z1, z2 = z.chunk(2)
        return nt_xent(z1, z2, self.settings.temperature), {"feature_std": spread(z.detach())}

    def after_step(self) -> None:
        """Nothing."""


class CurveLearner(TuningLearner):
    """θ_C of the curve between two fixed ends; the network's own weights are θ_C while it is trained.

    Args:
        settings: Of the method.
        network: Encoder, then projector.
        a, b: States of the network at t = 0 and t = 1.
    """

    def __init__(self, settings: TSC, network: nn.Sequential, a: State, b: State) -> None:
        super().__init__(settings, network)
        self.a, self.b = a, b
        self.put(middle({name: a[name] for name, _ in network.named_parameters()}, b))

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """NT-Xent + ½ · penalty · ‖γ(t)‖² at one t, uniform in [0, 1], for the whole batch."""
        t = float(torch.rand((), generator=batch.seed.child("t").torch()))
        point = self.at(t)
        loss, numbers = self.contrast(batch, point)
        square = torch.stack([value.square().sum() for value in point.values()]).sum()
        return loss + 0.5 * self.settings.penalty * square, numbers

    def at(self, t: float) -> dict[str, Tensor]:
        """γ(t); gradients reach θ_C."""
        return along(t, self.a, dict(self.network.named_parameters()), self.b)

    @torch.no_grad()
    def put(self, weights: State) -> None:
        """Make these the network's own weights."""
        for name, own in self.network.named_parameters():
            own.copy_(weights[name])
