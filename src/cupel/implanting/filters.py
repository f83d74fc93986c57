"""The steps of INACTIVE: a filter by itself, then filter and encoder together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.implanting.step import Aim, ImplantLearner
from cupel.losses.adaptive import AdaptiveCost, CostRule
from cupel.losses.distribution import sinkhorn_distance
from cupel.losses.perceptual import colour_distance, psnr, ssim
from cupel.protocols import Batch, Encoder, Images
from cupel.triggers.learned_filter import FilterNet

if TYPE_CHECKING:
    from cupel.attack.inactive import INACTIVE

__all__ = ["FilterLearner", "JointLearner", "rounded"]

_RAISED, _LOWERED = 1.5, 2.0  # factor and divisor of stage 1's cost


def rounded(x: Images) -> Images:
    """Whole grey levels, as an image file has them; the gradient is that of the identity.

    Example:
        >>> (rounded(torch.tensor([0.5])) * 255).tolist()
        [128.0]
    """
    return x + ((x.detach() * 255).round() / 255 - x.detach())


class _Scaled(torch.autograd.Function):
    """The identity; its gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0] * ctx.factor, None


def _likeness(
    attack: INACTIVE, x: Images, y: Images, encoder: Encoder
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """L_sim, mean SSIM and mean PSNR."""
    alike, noise = ssim(x, y).mean(), psnr(x, y, attack.psnr_cap).mean()
    loss = 1 - alike - attack.psnr_weight * noise
    if attack.transport_weight:
        with torch.no_grad():
            of_x = encoder(x)
        of_y = encoder(y)
        with torch.autocast(x.device.type, enabled=False):
            loss = loss + attack.transport_weight * sinkhorn_distance(of_x.to(x.dtype), of_y.to(x.dtype))
    return loss, alike, noise


class _Course(nn.Module):
    """Where stage 1 stands: the step, sums over the epoch, and the cost."""

    step: Tensor
    cost: Tensor
    sums: Tensor

    def __init__(self, cost: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # on the CPU: read in every step
        self.register_buffer("cost", torch.tensor([cost, 0, 0], dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64, device=device))


class FilterLearner:
    """Stage 1: L_sim − c · Dis.

    Args:
        attack: Settings.
        net: T.
        encoder: The clean encoder, frozen.
        per_epoch: Steps per epoch.
    """

    def __init__(self, attack: INACTIVE, net: FilterNet, encoder: Encoder, per_epoch: int) -> None:
        self.attack, self.net, self.encoder, self.per_epoch = attack, net, encoder, per_epoch
        self.course = _Course(attack.cost, net.enter.weight.device)
        self.state: nn.Module = nn.ModuleDict({"net": net, "course": self.course})

    def parameters(self) -> list[nn.Parameter]:
        """The filter's."""
        return list(self.net.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch."""
        x = batch.inputs.to(self.net.enter.weight.dtype) / 255
        y = self.net(x)
        loss, alike, noise = _likeness(self.attack, x, y, self.encoder)
        away = colour_distance(y, self.attack.augment(batch.inputs, batch.seed.child("view").torch(x.device)))
        with torch.no_grad():
            self.course.sums.add_(torch.stack([alike, noise]))
        cost = float(self.course.cost[0])
        return loss - cost * away, {"ssim": alike, "psnr": noise, "dis": away, "cost": self.course.cost[0].clone()}

    def after_step(self) -> None:
        """Counts the step; adapts c where an epoch ends."""
        course = self.course
        course.step += 1
        if int(course.step) % self.per_epoch:
            return
        alike, noise = (course.sums / self.per_epoch).tolist()
        course.sums.zero_()
        cost, up, down = course.cost.tolist()
        rule = CostRule(_RAISED, _LOWERED, self.attack.patience)
        met = alike >= self.attack.min_ssim and noise >= self.attack.min_psnr
        course.cost.copy_(torch.tensor(rule.after(AdaptiveCost(cost, int(up), int(down)), met)))


class JointLearner(ImplantLearner):
    """Stage 2: encoder and filters in one pass, each with the gradient of its own loss.

    Args:
        attack: Settings.
        encoder: The copy that is trained.
        clean, ids, aims: As for `ImplantLearner`.
        filters: One per aim; None = the aim has a trigger.
        frozen: The clean encoder, for the transport term.
    """

    def __init__(
        self,
        attack: INACTIVE,
        encoder: ImageEncoder,
        clean: Tensor,
        ids: Tensor,
        aims: Sequence[Aim],
        filters: Sequence[FilterNet | None],
        frozen: Encoder,
    ) -> None:
        super().__init__(
            encoder,
            clean,
            ids,
            aims,
            lambda_reference=attack.lambda_reference,
            lambda_utility=attack.lambda_utility,
            lambda_trigger=attack.lambda_trigger,
            augment=SimCLRAugment.preset("references") if attack.l1_augment else None,
            draws=attack.l1_draws,
        )
        self.attack, self.filters, self.frozen = attack, filters, frozen
        self.whole = nn.ModuleDict({"encoder": encoder.module, "filters": nn.ModuleList([f for f in filters if f])})
        self.filtered: list[Tensor] = []

    @property
    def state(self) -> nn.Module:
        """Encoder and filters."""
        return self.whole

    def parameters(self) -> list[nn.Parameter]:
        """The encoder's weights but BatchNorm's, then the filters'."""
        return [*self.trainable, *self.whole["filters"].parameters()]

    def stamps(self, batch: Batch) -> Tensor:
        """Filtered images. On the way back the gradient of L0 gets the filter's weight in place of the encoder's."""
        x, ids = batch.inputs.to(self.aims[0].references.dtype).div_(255), self.ids[batch.rows].tolist()
        weight, parts = self.weights[0], []
        self.filtered = []
        for i, (aim, net) in enumerate(zip(self.aims, self.filters, strict=True)):
            if net is None:
                assert aim.goal.trigger is not None
                stamped = aim.goal.trigger(batch.inputs, ids, batch.seed.child("trigger", i))
                parts.append(stamped.to(x.dtype).div_(255))
                continue
            y = net(x)
            self.filtered.append(y)
            seen = rounded(y if weight else y.detach())
            if weight:
                seen = _Scaled.apply(seen, self.attack.attack_weight / weight)
            parts.append(seen)
        return torch.cat(parts)

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """L0 + λ1 L1 + λ2 L2 + L_sim − w_dis · Dis; see `stamps` for the filter's share of L0."""
        total, terms = super().loss(batch)
        if not self.filtered:
            return total, terms
        x = batch.inputs.to(self.filtered[0].dtype).div_(255)
        view = self.attack.augment(batch.inputs, batch.seed.child("view").torch(x.device)).to(x.dtype)
        shown: list[Any] = []
        for y in self.filtered:
            likeness, alike, noise = _likeness(self.attack, x, y, self.frozen)
            away = colour_distance(y, view)
            total = total + likeness - self.attack.distance_weight * away
            shown.append(torch.stack([alike, noise, away]).detach())
        alike, noise, away = torch.stack(shown).mean(dim=0)
        return total, {**terms, "ssim": alike, "psnr": noise, "dis": away}
