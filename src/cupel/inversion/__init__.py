"""Trigger inversion: the smallest mask and pattern that make a model do something, from several starts at once."""

from __future__ import annotations

from cupel.inversion.budget import Budget, CostSchedule, CostState
from cupel.inversion.forms import Form, Frequency, Linf, Stamp, random_start
from cupel.inversion.invert import Inverted, Objective, frozen, invert
from cupel.inversion.stamping import concentration, squash, stamp

__all__ = [
    "Budget",
    "CostSchedule",
    "CostState",
    "Form",
    "Frequency",
    "Inverted",
    "Linf",
    "Objective",
    "Stamp",
    "concentration",
    "frozen",
    "invert",
    "random_start",
    "squash",
    "stamp",
]
