"""SSL-Backdoor: a patch on some pre-training images of one class."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from cupel.poisoning import PoisonMode, members_of, poisoned, share_of, stamped, targets_of
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, settings
from cupel.triggers import TRIGGERS, RandomPatch
from cupel.types import Dataset, Goal, Knowledge, Need, Poisoned

__all__ = ["SSLBackdoor"]


@settings
class SSLBackdoor:
    """Stamps a patch on a share of the target class's pre-training images; the victim's training does the rest.

    Both views of a stamped image often show the patch, so self-supervised training ties "patch" to the class.
    The victim's labels stay as they are and the encoder is never touched.

    Args:
        poison_rate_in_class: ρ, stamped images / images of the target class, in [0, 1].
        poison_mode: `replace` = the stamped image takes the place of the clean one; `add` = stamped copies are
            appended under new ids.
        trigger: What is stamped while poisoning, where the goal brings no trigger of its own.
        test_low, test_high: The band of a `random_patch` at test time; other triggers are the same at test time.

    The goal's `target_class` is a label of the pre-training data.

    Source: Saha et al., CVPR 2022, arXiv:2105.10123.
    Deviations: ρ = 0.5 as in the paper, where the released settings say 1.0; images are stamped at the size they have
    in the data set, not at the size of their original files; the trigger picture is drawn (see `RandomPatch`).
    """

    poison_rate_in_class: Fraction = 0.5
    poison_mode: PoisonMode = "replace"
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = RandomPatch()
    test_low: Fraction = 0.10
    test_high: Fraction = 0.90
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goals with test-time triggers.

        Raises:
            UsageError: a goal names no target class, or two name the same; the trigger does not fit into the images.
            DataError: no goal; the target class is absent; the rate selects no image, or every image of the data set.
        """
        targets = targets_of(attacker, "ssl_backdoor")
        goals = tuple(dataclasses.replace(goal, trigger=self._at_test_time(goal)) for goal in attacker.goals)
        picks, images = [], []
        for i, (goal, target) in enumerate(zip(attacker.goals, targets, strict=True)):
            rate, whose = self.poison_rate_in_class, f"images of class {target}"
            members = members_of(clean, target)
            pick = share_of(clean, members, rate, seed.child("choose", i), "poison_rate_in_class", whose)
            picks.append(pick)
            images.append(stamped(clean, pick, self._trigger(goal), seed.child("place", i)))
        return poisoned(clean, torch.cat(picks), torch.cat(images), self.poison_mode, goals)

    def _trigger(self, goal: Goal) -> Trigger[Tensor]:
        return self.trigger if goal.trigger is None else goal.trigger

    def _at_test_time(self, goal: Goal) -> Trigger[Tensor]:
        trigger = self._trigger(goal)
        if isinstance(trigger, RandomPatch):
            return dataclasses.replace(trigger, low=self.test_low, high=self.test_high)
        return trigger
