"""No-Label Backdoor: a poison set that hangs together, found without labels."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cupel.errors import DataError, UsageError
from cupel.inference import features
from cupel.poisoning import PoisonMode, members_of, poisoned, stamped, targets_of
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.selection import contrastive_scores, neighbours, smallest_sufficient_cluster
from cupel.settings import Fraction, OneOf, PositiveInt, settings
from cupel.triggers import TRIGGERS
from cupel.triggers.checker import Checker
from cupel.types import Dataset, Goal, Knowledge, Need, Poisoned

__all__ = ["NLB"]

Selection = Literal["contrastive", "contrastive_pos", "contrastive_neg", "kmeans", "random", "oracle"]


@settings
class NLB:
    """Stamps images that a clean encoder finds alike; self-supervised training then ties the trigger to their class.

    The budget is M = ⌊rate · N / C⌋ images. Which class they lead to is known only afterwards: the goals come back
    without a target class, and whoever holds the labels takes the majority class of the poisoned rows
    (`cupel.selection.majority`; its share is the class-consistency rate).

    Args:
        selection: `contrastive` = the M nearest neighbours of the image whose neighbourhood hangs together best and
            stands out most; `contrastive_pos`, `contrastive_neg` = by one half of that score; `kmeans` = first M images
            of the smallest cluster that has M; `random`; `oracle` = M images of the goal's target class, by labels.
        poison_rate_in_class: M as a share of an average class.
        num_classes: C, which only sets the budget.
        num_clusters: K of `kmeans`; None = C, as published, which a real attacker would have to guess.
        poison_mode: In place of the clean images, or beside them.
        trigger: What is stamped, where the goal brings no trigger of its own.

    Source: Wang, Ma, Jegelka, Wang, arXiv:2404.06694, and its code.
    Deviations: images are embedded as they are by the attacker's encoder, usually the victim's clean twin.
    """

    selection: Selection = "contrastive"
    poison_rate_in_class: Fraction = 0.6
    num_classes: PositiveInt = 10
    num_clusters: PositiveInt | None = None
    poison_mode: PoisonMode = "replace"
    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Checker()
    revision: ClassVar[int] = 1

    @property
    def needs(self) -> frozenset[Need]:
        """Labels for the oracle, nothing for a random choice, else an encoder of the attacker's own."""
        if self.selection == "oracle":
            return frozenset({"labels"})
        return frozenset() if self.selection == "random" else frozenset({"surrogate"})

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goal without a target class.

        Raises:
            UsageError: more or less than one goal.
            DataError: the budget is no image or all; no surrogate encoder; its embeddings all coincide; every cluster
                is smaller than the budget; the oracle's class is absent or too small.
        """
        if len(attacker.goals) != 1:
            raise UsageError("nlb", f"takes one goal, got {len(attacker.goals)}", "keep one downstream task")
        goal = attacker.goals[0]
        m = int(self.poison_rate_in_class * len(clean) / self.num_classes)
        if not 0 < m < len(clean):
            what = f"poison_rate_in_class {self.poison_rate_in_class:g} selects {m} of {len(clean)} images"
            raise DataError(clean.name, what, "choose another rate")
        rows = self._rows(clean, attacker, m, seed)
        trigger = self.trigger if goal.trigger is None else goal.trigger
        found: Goal = dataclasses.replace(goal, trigger=trigger, target_class=None)
        return poisoned(clean, rows, stamped(clean, rows, trigger, seed.child("stamp")), self.poison_mode, (found,))

    def _rows(self, clean: Dataset, attacker: Knowledge, m: int, seed: Seed) -> Tensor:
        draw = seed.child("choose")
        if self.selection == "random":
            return torch.randperm(len(clean), generator=draw.torch())[:m].sort().values
        if self.selection == "oracle":
            members = members_of(clean, targets_of(attacker, "nlb")[0])
            if len(members) < m:
                raise DataError(clean.name, f"has {len(members)} images of the target class, {m} are to be poisoned")
            return members[torch.randperm(len(members), generator=draw.torch())[:m]].sort().values
        if attacker.surrogate is None:
            raise DataError("nlb", "the attacker has no encoder to choose by", "give `surrogate`, or selection random")
        unit = normalize(features(attacker.surrogate, clean), dim=1)
        if float((unit - unit[:1]).abs().max()) < 1e-6:
            raise DataError(
                "nlb", "the surrogate's embeddings all coincide", "use an encoder that has learnt something"
            )
        if self.selection == "kmeans":
            clusters = self.num_clusters or self.num_classes
            return smallest_sufficient_cluster(unit, m, clusters, draw, clean.name).to("cpu")
        positive, negative = self.selection != "contrastive_neg", self.selection != "contrastive_pos"
        scores = contrastive_scores(unit, m, positive=positive, negative=negative)
        return neighbours(unit, int(scores.argmax()), m).to("cpu")
