"""The step of DRUPE: three stages, and costs that adapt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.implanting.step import Aim, ImplantLearner, Seen
from cupel.losses.adaptive import AdaptiveCost
from cupel.losses.distribution import directions, mean_pair_cosine, sliced_wasserstein
from cupel.losses.spreading import balance, crowding, nearest_reference
from cupel.protocols import Batch
from cupel.seeds import Seed

if TYPE_CHECKING:
    from cupel.attack.drupe import DRUPE

__all__ = ["DrupeLearner"]


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


class _Schedule(nn.Module):
    """What a resumed run must know beside the weights: the step, sums over the epoch, and both costs."""

    def __init__(self, costs: tuple[float, float], device: torch.device) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # on the CPU: read in every step
        self.register_buffer("costs", torch.tensor([[cost, 0, 0] for cost in costs], dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(4, dtype=torch.float64, device=device))

    step: Tensor
    costs: Tensor
    sums: Tensor


class DrupeLearner(ImplantLearner):
    """DRUPE's loss, its three stages and the adapting costs.

    Args:
        attack: Settings.
        encoder: The copy that is trained.
        clean, ids, aims: As for `ImplantLearner`.
        per_epoch: Steps per epoch.
    """

    def __init__(
        self, attack: DRUPE, encoder: ImageEncoder, clean: Tensor, ids: Tensor, aims: tuple[Aim, ...], per_epoch: int
    ) -> None:
        super().__init__(
            encoder,
            clean,
            ids,
            aims,
            lambda_reference=attack.lambda_reference,
            lambda_utility=attack.lambda_utility,
            augment=SimCLRAugment.preset("references") if attack.l1_augment else None,
            draws=attack.l1_draws,
        )
        self.attack, self.per_epoch = attack, per_epoch
        self.schedule = _Schedule((attack.cost, attack.cost_wasserstein), next(encoder.module.parameters()).device)
        self.whole = nn.ModuleDict({"encoder": encoder.module, "schedule": self.schedule})

    @property
    def state(self) -> nn.Module:
        """The encoder and where the schedule stands."""
        return self.whole

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 1."""
        return int(self.schedule.step) // self.per_epoch + 1

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of the stage that the epoch is in; means over goals of every term."""
        seen = self.seen(batch)
        common = super().terms(seen)
        with torch.autocast(batch.inputs.device.type, enabled=False):  # sorting needs all digits
            rows = self._by_goal(seen, batch.seed)
        terms = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        L0, L1, L2 = terms["L0"], common["L1"], common["L2"]
        L3, D, S, W = terms["L3"], terms["balance"], terms["concentration"], terms["wasserstein"]
        with torch.no_grad():
            self.schedule.sums.add_(torch.stack([L0, L1, L2, S]).detach())
        _, w1, w2 = self.weights
        loss, t, a = w1 * L1 + w2 * L2, self.epoch, self.attack
        if t <= a.warmup_epochs:
            loss = loss + 0.5 * L3 - 0.2 * terms["L3 if close to 0"]
        else:
            loss = loss + L0 + terms["crowding"]
            if t <= a.warmup_epochs + a.attract_epochs:
                loss = loss + 2 * D
            else:
                c, c1 = self.schedule.costs[:, 0].tolist()
                loss = loss + c * (D + S) + c1 * W + 0.5 * D + 1.5 * terms["D if large"]
        shown = {"L0": L0, "L1": L1, "L2": L2, "L3": L3, "balance": D, "concentration": S, "wasserstein": W}
        return loss, {**shown, "cost": self.schedule.costs[0, 0].clone(), "cost_w": self.schedule.costs[1, 0].clone()}

    def _by_goal(self, seen: Seen, seed: Seed) -> list[dict[str, Tensor]]:
        device = seen.x.device
        along = directions(self.attack.projections, seen.x.shape[1], seed.child("directions").torch(device))
        x, every, references_of_all = _wide(seen.x), _wide(seen.stamped), _wide(seen.references)
        zero = torch.zeros((), device=device, dtype=x.dtype)
        spread = x.std(dim=0).mean()
        found = []
        owned = torch.split(references_of_all, [len(aim.references) for aim in self.aims])
        for stamped, references in zip(every, owned, strict=True):
            unit = F.normalize(stamped, dim=1, eps=1e-12)
            similarity = F.normalize(references, dim=1, eps=1e-12) @ unit.T
            L3, D = mean_pair_cosine(references, include_self=True), balance(similarity)
            found.append(
                {
                    "L0": nearest_reference(similarity),
                    "L3": L3,
                    "L3 if close to 0": torch.where(L3 < 0.2, L3, zero),
                    "crowding": crowding(L3),
                    "balance": D,
                    "D if large": torch.where(D > 0.1, D, zero),
                    "concentration": mean_pair_cosine(stamped),
                    "wasserstein": sliced_wasserstein(stamped, x, along.to(x.dtype)) / spread,
                }
            )
        return found

    def after_step(self) -> None:
        """Counts the step; adapts the costs where an epoch ends."""
        schedule = self.schedule
        schedule.step += 1
        if int(schedule.step) % self.per_epoch:
            return
        l0, l1, l2, concentration = (schedule.sums / self.per_epoch).tolist()
        schedule.sums.zero_()
        if int(schedule.step) // self.per_epoch <= self.attack.adapt_after:
            return
        a = self.attack
        works = l0 < a.met_trigger and l1 < a.met_clean and l2 < a.met_clean
        for i, met in enumerate((works, works and concentration < a.met_concentration)):
            cost, up, down = schedule.costs[i].tolist()
            after = a.cost_rule.after(AdaptiveCost(cost, int(up), int(down)), met)
            schedule.costs[i] = torch.tensor(after, dtype=torch.float64)
