"""Weights of loss terms that rise while a goal is met and fall while it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["AdaptiveCost", "CostRule"]


class AdaptiveCost(NamedTuple):
    """A weight, and how many checks in a row the goal was met (`up`) or missed (`down`) since it changed."""

    cost: float
    up: int = 0
    down: int = 0


@dataclass(frozen=True)
class CostRule:
    """How the weight changes.

    Args:
        raised, lowered: Factor and divisor, > 1.
        patience: Checks in a row that it takes.

    Example:
        >>> CostRule(raised=1.5, lowered=2.0, patience=1).after(AdaptiveCost(1.0), met=True)
        AdaptiveCost(cost=1.5, up=0, down=0)
    """

    raised: float
    lowered: float
    patience: int

    def after(self, state: AdaptiveCost, met: bool) -> AdaptiveCost:
        """The state after one more check."""
        up, down = (state.up + 1, 0) if met else (0, state.down + 1)
        if up >= self.patience:
            return AdaptiveCost(state.cost * self.raised)
        if down >= self.patience:
            return AdaptiveCost(state.cost / self.lowered)
        return AdaptiveCost(state.cost, up, down)
