"""Two optimisers in one training: the encoder's and that of what is learned beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from cupel.optimizers import Recipe

__all__ = ["TwoRates"]


@dataclasses.dataclass(frozen=True)
class TwoRates:
    """A training whose last parameters have an optimiser of their own.

    Args:
        attack: How the others are trained.
        lr: Adam's learning rate of the last ones, scheduled as the others' is.
        num_filter: How many the last ones are.
    """

    attack: Recipe
    lr: float
    num_filter: int

    @property
    def epochs(self) -> int:
        return self.attack.epochs

    @property
    def steps(self) -> int | None:
        return self.attack.steps

    @property
    def batch_size(self) -> int:
        return self.attack.batch_size

    @property
    def precision(self) -> str:
        return self.attack.precision

    def steps_per_epoch(self, n: int, name: str) -> int:
        return self.attack.steps_per_epoch(n, name)

    def total_steps(self, n: int, name: str) -> int:
        return self.attack.total_steps(n, name)

    def lr_at(self, step: int, total: int) -> float:
        return self.attack.lr_at(step, total)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if not self.num_filter:
            return self.attack.make_optimizer(parameters)
        adam = Recipe(optimizer="adam", lr=self.lr)
        encoder, filters = parameters[: -self.num_filter], parameters[-self.num_filter :]
        ratio = self.lr / self.attack.lr
        return _Both(self.attack.make_optimizer(encoder), adam.make_optimizer(filters), ratio)


class _Both(torch.optim.Optimizer):
    """Two optimisers that step together and share one state; the learning rate set is the first one's.

    Args:
        first, second: Over different parameters.
        ratio: Learning rate of the second over that of the first.
    """

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer, ratio: float) -> None:
        super().__init__([*first.param_groups, *second.param_groups], {})
        first.state = second.state = self.state
        self.first, self.second, self.ratio = first, second, ratio

    def step(self, closure: Any = None) -> Any:
        """One update of both."""
        for group in self.second.param_groups:
            group["lr"] *= self.ratio
        self.first.step()
        self.second.step()
