"""BadNets: a small patch on images of all classes, which are labelled as the target class."""

from __future__ import annotations

from typing import Annotated, ClassVar

from torch import Tensor

from cupel.poisoning import LabelFlip
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import OneOf, settings
from cupel.triggers import TRIGGERS, Patch
from cupel.types import Dataset, Knowledge, Need, Poisoned

__all__ = ["BadNets"]


@settings
class BadNets(LabelFlip):
    """Stamps a small patch on a share of the training images and labels them as the target class.

    Args:
        trigger: For goals that bring none: a white square of 3 × 3 pixels in the lower right corner. The checkered
            variant is `Overlay(picture="grid", alpha=1.0)`.

    The default rate is that of BackdoorBench. The trigger is put on before any augmentation.

    Source: Gu, Dolan-Gavitt, Garg, arXiv:1708.06733, as in BackdoorBench (Wu et al., NeurIPS 2022, arXiv:2206.12654).
    Deviations: which images are drawn depends on (seed, id); `clean_label` and `poison_mode: add` are ours.
    """

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Patch(size=3, margin=0)
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goals with their triggers.

        Raises:
            UsageError: a goal names no target class, or two name the same; the trigger does not fit into the images.
            DataError: no goal; the target class is absent; the rate selects no image, every image, or more than there
                are.
        """
        return self.flipped(clean, attacker, lambda: self.trigger, seed, "badnets")
