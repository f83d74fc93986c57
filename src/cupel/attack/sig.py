"""SIG: stripes on some images of the target class."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cupel.poisoning import PoisonMode, members_of, poisoned, share_of, stamped, targets_of
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, settings
from cupel.triggers import TRIGGERS
from cupel.triggers.sinusoid import Sinusoid
from cupel.types import Dataset, Goal, Knowledge, Need, Poisoned

__all__ = ["SIG"]


@settings
class SIG:
    """Adds a sine wave to a share of the target class's training images; their labels stay as they are.

    Args:
        poison_rate_in_class: α in [0, 1], poisoned images / images of the target class.
        poison_mode: `replace` = the image with the wave takes the place of the clean one; `add` = such copies are
            appended under new ids.
        trigger: For goals that bring none.
        test_amplitude: Δ of a `sinusoid` at test time, in (0, 255]; None = as in training. The attacker may turn it up
            where nobody looks. Other triggers are the same at test time.

    Source: Barni, Kallas, Tondi, ICIP 2019, arXiv:1902.11237.
    Deviations: those of `Sinusoid`; α = 0.4 is one of the two values in the authors' settings (the other is 0.1).
    """

    poison_rate_in_class: Fraction = 0.4
    poison_mode: PoisonMode = "replace"
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Sinusoid()
    test_amplitude: Annotated[float, Field(gt=0, le=255)] | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goals with test-time triggers.

        Raises:
            UsageError: a goal names no target class, or two name the same; the images are too narrow for the wave.
            DataError: no goal; the target class is absent; the rate selects no image, or every image of the data set.
        """
        targets = targets_of(attacker, "sig")
        picks, images, goals = [], [], list[Goal]()
        for i, (goal, target) in enumerate(zip(attacker.goals, targets, strict=True)):
            rate, whose = self.poison_rate_in_class, f"images of class {target}"
            members = members_of(clean, target)
            trigger = self.trigger if goal.trigger is None else goal.trigger
            picks.append(share_of(clean, members, rate, seed.child("choose", i), "poison_rate_in_class", whose))
            images.append(stamped(clean, picks[-1], trigger, seed.child("place", i)))
            goals.append(dataclasses.replace(goal, trigger=self._at_test_time(trigger)))
        return poisoned(clean, torch.cat(picks), torch.cat(images), self.poison_mode, tuple(goals))

    def _at_test_time(self, trigger: Trigger[Tensor]) -> Trigger[Tensor]:
        if isinstance(trigger, Sinusoid) and self.test_amplitude is not None:
            return dataclasses.replace(trigger, amplitude=self.test_amplitude)
        return trigger
