"""CTRL: a faint wave on a few pre-training images of one class."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from cupel.poisoning import PoisonMode, members_of, poisoned, stamped, targets_of, within_budget
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, settings
from cupel.triggers import TRIGGERS
from cupel.triggers.spectral import Spectral
from cupel.types import Dataset, Goal, Knowledge, Need, Poisoned

__all__ = ["CTRL"]

_SLACK = 1e-9  # 0.29 · 100 is a little less than 29 in floating point


@settings
class CTRL:
    """Adds a wave in the colour channels to the first images of the target class; their labels stay as they are.

    The wave covers the whole image, so crops, colour jitter and grey mixing leave some of it in both views:
    self-supervised training ties it to what the views share, the class.

    Args:
        poison_rate: ρ in [0, 1], poisoned images / all images; ρ · N, rounded down, are taken, the first ones of
            the class in the order of the data.
        poison_mode: `replace` = the image with the wave takes the place of the clean one; `add` = such copies are
            appended under new ids.
        trigger: For goals that bring none; the same in training and at test time.

    Strength is a matter of balance: weaker and stronger waves than β = 100 may both fail, and a horizontal flip turns
    the default wave into its negative, so half of the views teach the opposite sign.

    Source: Li et al., ICCV 2023, arXiv:2210.07346.
    Deviations: those of `Spectral`; several goals are allowed, each with its own class; a rate that asks for more
    images than the class has is an error, where the authors' code takes all of them. Colour jitter that is switched on
    or off for a whole batch at once, as in that code, is a matter of the objective and not offered.
    """

    poison_rate: Fraction = 0.01
    poison_mode: PoisonMode = "replace"
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Spectral()
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goals with their triggers.

        Raises:
            UsageError: a goal names no target class, or two name the same.
            DataError: no goal; the target class is absent; the rate selects no image, every image of the data set, or
                more than the class has.
        """
        targets = targets_of(attacker, "ctrl")
        whole = (
            len(clean) / (1 - self.poison_rate) if self.poison_mode == "add" and self.poison_rate < 1 else len(clean)
        )
        count = math.floor(self.poison_rate * whole + _SLACK)
        picks, images, goals = [], [], list[Goal]()
        for i, (goal, target) in enumerate(zip(attacker.goals, targets, strict=True)):
            members = members_of(clean, target)
            within_budget(clean, count, members, self.poison_rate, f"images of class {target}")
            trigger = self.trigger if goal.trigger is None else goal.trigger
            picks.append(members[:count])
            images.append(stamped(clean, picks[-1], trigger, seed.child("place", i)))
            goals.append(dataclasses.replace(goal, trigger=trigger))
        return poisoned(clean, torch.cat(picks), torch.cat(images), self.poison_mode, tuple(goals))
