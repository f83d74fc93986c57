"""SSL-Backdoor: a patch on some pre-training images of one class."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cupel.errors import DataError, UsageError
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, settings
from cupel.triggers import TRIGGERS, RandomPatch
from cupel.triggers.draws import uniforms
from cupel.types import Dataset, Goal, Knowledge, Need, Poisoned

__all__ = ["SSLBackdoor", "chosen_rows"]


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
    poison_mode: Literal["replace", "add"] = "replace"
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
        if not attacker.goals:
            raise DataError("ssl_backdoor", "the attacker has no goal", "name a target class")
        targets = [goal.target_class for goal in attacker.goals]
        if len(set(targets)) < len(targets):
            raise UsageError("ssl_backdoor", "two goals have the same target class", "give each goal its own")
        picks = [self._picked(clean, goal, seed.child("choose", i)) for i, goal in enumerate(attacker.goals)]
        rows = torch.cat(picks)
        if self.poison_mode == "replace" and len(rows) == len(clean):
            rate = f"poison_rate_in_class {self.poison_rate_in_class:g}"
            raise DataError(clean.name, f"{rate} selects all {len(clean)} images", "choose a smaller rate")
        everything = clean.inputs if isinstance(clean.inputs, Tensor) else clean.inputs[torch.arange(len(clean))]
        stamped = torch.cat(
            [
                self._trigger(goal)(everything[pick], clean.ids[pick].tolist(), seed.child("place", i))
                for i, (goal, pick) in enumerate(zip(attacker.goals, picks, strict=True))
            ]
        )
        goals = tuple(dataclasses.replace(goal, trigger=self._at_test_time(goal)) for goal in attacker.goals)
        data, changed = _merged(clean, everything, rows, stamped, self.poison_mode)
        return Poisoned(data, changed, goals)

    def _picked(self, clean: Dataset, goal: Goal, seed: Seed) -> Tensor:
        if goal.target_class is None:
            raise UsageError("ssl_backdoor", "the goal names no target class", "add `target_class: …`")
        members = (clean.labels == goal.target_class).nonzero().flatten()
        if not len(members):
            what = f"holds no image of target class {goal.target_class}"
            raise DataError(clean.name, what, f"choose one of {sorted(set(clean.labels.tolist()))[:20]}")
        pick = members[chosen_rows(clean.ids[members].tolist(), self.poison_rate_in_class, seed)]
        if not len(pick):
            what = f"poison_rate_in_class {self.poison_rate_in_class:g} selects none of {len(members)} images"
            raise DataError(clean.name, f"{what} of class {goal.target_class}", "choose a larger rate")
        return pick

    def _trigger(self, goal: Goal) -> Trigger[Tensor]:
        return self.trigger if goal.trigger is None else goal.trigger

    def _at_test_time(self, goal: Goal) -> Trigger[Tensor]:
        trigger = self._trigger(goal)
        if isinstance(trigger, RandomPatch):
            return dataclasses.replace(trigger, low=self.test_low, high=self.test_high)
        return trigger


def chosen_rows(ids: list[int], rate: float, seed: Seed) -> Tensor:
    """Positions of `round(rate · n)` of the given ids, ascending; a random choice without repetition.

    Which ids are chosen depends on (seed, set of ids), not on their order. Halves round to the even number.

    Example:
        >>> len(chosen_rows(list(range(10)), 0.5, Seed(0)))
        5
    """
    lots = uniforms(seed, ids, 1)[:, 0]
    first = np.argsort(lots, kind="stable")[: round(rate * len(ids))]
    return torch.from_numpy(np.sort(first))


def _merged(clean: Dataset, inputs: Tensor, rows: Tensor, stamped: Tensor, mode: str) -> tuple[Dataset, Tensor]:
    """The data set with the stamped images in it, and where they are."""
    order = rows.argsort()
    rows, stamped, name = rows[order], stamped[order], f"{clean.name} (poisoned)"
    if mode == "replace":
        inputs = inputs.clone()
        inputs[rows] = stamped
        return clean.with_inputs(inputs, name), rows
    added = torch.arange(len(rows))
    data = dataclasses.replace(
        clean,
        inputs=torch.cat([inputs, stamped]),
        labels_=torch.cat([clean.labels_, clean.labels_[rows]]),
        ids=torch.cat([clean.ids, clean.ids.max() + 1 + added]),
        name=name,
    )
    return data, len(clean) + added
