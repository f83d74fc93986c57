"""Blended: a faint picture over images of all classes, which are labelled as the target class."""

from __future__ import annotations

from typing import Annotated, ClassVar

from torch import Tensor

from cupel.poisoning import LabelFlip
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import OneOf, settings
from cupel.triggers import TRIGGERS
from cupel.triggers.overlay import Overlay
from cupel.types import Dataset, Knowledge, Need, Poisoned

__all__ = ["Blended"]


@settings
class Blended(LabelFlip):
    """Mixes a picture into a share of the training images and labels them as the target class.

    Args:
        trigger: For goals that bring none: `⌊0.8 x + 0.2 p⌋` with the picture of a cat, in training and at test time.

    The default rate is that of BackdoorBench. The trigger is put on before any augmentation.

    Source: Chen et al., arXiv:1712.05526 (blended injection), as in BackdoorBench (Wu et al., NeurIPS 2022,
    arXiv:2206.12654).
    Deviations: the published picture is replaced by a drawing of our own; which images are drawn depends on
    (seed, id); `clean_label` and `poison_mode: add` are ours.
    """

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Overlay()
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goals with their triggers.

        Raises:
            UsageError: a goal names no target class, or two name the same.
            DataError: no goal; the target class is absent; the rate selects no image, every image, or more than there
                are; the picture cannot be read.
        """
        return self.flipped(clean, attacker, lambda: self.trigger, seed, "blended")
