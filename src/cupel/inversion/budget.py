"""How long an inversion runs, and how it trades success for a smaller mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Budget", "CostSchedule", "CostState"]


class CostState(NamedTuple):
    """Weight λ of the mask's size, and the length of the current run of successes or failures; each `[starts]`."""

    cost: Float[Tensor, " starts"]
    up: Int[Tensor, " starts"]
    down: Int[Tensor, " starts"]

    def at(self, rows: Tensor) -> CostState:
        """Only the given starts."""
        return CostState(self.cost[rows], self.up[rows], self.down[rows])


@dataclass(frozen=True)
class CostSchedule:
    """How the weight λ of the mask's size follows success.

    More than `patience` successes in a row: λ is multiplied, while it is below `high`. More than `patience` failures
    in a row: λ is divided, while it is at least `low` (so it may end one step below). Either way the count starts anew.

    Args:
        initial, factor, low, high: λ₀ and its step and bounds.
        patience: Length of a run that does not yet count.

    Source: Wang et al., Neural Cleanse, S&P 2019; constants of DECREE's code.
    Deviations: the "reset to λ₀" branch of that code cannot be reached and is left out.
    """

    initial: float = 1e-3
    factor: float = 5.0
    low: float = 1e-5
    high: float = 1e5
    patience: int = 5

    def start(self, num_starts: int, device: torch.device | str = "cpu") -> CostState:
        """λ₀ for every start."""
        zeros = torch.zeros(num_starts, dtype=torch.int64, device=device)
        return CostState(torch.full((num_starts,), self.initial, dtype=torch.float64, device=device), zeros, zeros)

    def after(self, state: CostState, success: Bool[Tensor, " starts"]) -> CostState:
        """The state after one batch."""
        cost = state.cost
        up = torch.where(success, state.up + 1, 0)
        down = torch.where(success, 0, state.down + 1)
        raised, lowered = up > self.patience, down > self.patience
        cost = torch.where(raised & (cost < self.high), cost * self.factor, cost)
        cost = torch.where(lowered & (cost >= self.low), cost / self.factor, cost)
        return CostState(cost, torch.where(raised, 0, up), torch.where(lowered, 0, down))


@dataclass(frozen=True)
class Budget:
    """How long and how an inversion runs.

    Args:
        steps: Batches in all, unless a start stops early.
        batch_size: Images per start and batch; all images where there are fewer.
        lr: Learning rates of Adam, one after the other.
        lr_until: Share of the steps at which each rate but the last ends.
        betas: Adam's.
        goal: Reach above which a batch is a success.
        patience: A start that found a trigger stops at the end of an epoch when its best did not improve for more
            than this many batches and the epoch's mean reach is above `goal`; None = never.
        cost: Schedule of λ.
    """

    steps: int
    batch_size: int
    lr: tuple[float, ...] = (0.5, 0.1, 0.05)
    lr_until: tuple[float, ...] = (0.03, 0.05)
    betas: tuple[float, float] = (0.5, 0.9)
    goal: float = 0.99
    patience: int | None = 10
    cost: CostSchedule = CostSchedule()

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr[sum(step >= round(share * self.steps) for share in self.lr_until)]
