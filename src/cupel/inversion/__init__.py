"""Trigger inversion: the smallest mask and pattern that make a model do something, from several starts at once."""

from __future__ import annotations

from cupel.inversion.budget import Budget, CostSchedule, CostState
from cupel.inversion.invert import Inverted, Objective, frozen, invert, random_start
from cupel.inversion.stamping import concentration, squash, stamp

__all__ = [
    "Budget",
    "CostSchedule",
    "CostState",
    "Inverted",
    "Objective",
    "concentration",
    "frozen",
    "invert",
    "random_start",
    "squash",
    "stamp",
]
