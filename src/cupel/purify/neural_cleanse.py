"""What Neural Cleanse's two mitigations share: a probe on the encoder, and the trigger that is worked against."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from cupel.inference import FrozenProbe
from cupel.inversion.classwise import ClassSearch
from cupel.probe import PROBES, Linear
from cupel.protocols import Classifier, Encoder, Probe
from cupel.purify.base import Job
from cupel.purify.labelled import ClassifierPurifier
from cupel.purify.reversed_trigger import ReversedTriggers, reversed_triggers
from cupel.seeds import Seed
from cupel.settings import OneOf, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["Mitigation"]


@settings
class Mitigation(ClassifierPurifier):
    """Settings and verbs of both. Evidence is used: triggers that a scanner inverted and that converged.

    Args:
        probe: Head that is fitted on encoders, which bring none.
        num_triggers: Reversed triggers that are worked against, smallest first.
        search: How they are searched for where no scanner gives any.
    """

    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    num_triggers: PositiveInt = 1
    search: ClassSearch = ClassSearch(steps=60, images_per_step=128)

    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {},
        "standard": {"search": ClassSearch(steps=150, images_per_step=256)},
        "paper": {"search": ClassSearch()},
    }

    def classifier(self, encoder: Encoder, clean: Dataset, seed: Seed) -> Classifier:
        """The encoder with the probe."""
        return self.probe.fit(encoder, clean, seed.child("probe"))

    def classes(self, model: Classifier, clean: Dataset) -> int:
        """Those of the images: any head will do."""
        return clean.num_classes

    def treat(self, model: FrozenProbe, job: Job) -> History:
        """Choose or find the triggers, then work against them.

        Raises:
            DataError: evidence of another size; no trigger was found.
        """
        triggers = reversed_triggers(
            model.encoder, model.head, job.clean, job.evidence, self.search, self.num_triggers, job.seed.child("search")
        )
        return self.mitigate(model, triggers, job.clean, job.seed, job.checkpoint)

    @abc.abstractmethod
    def mitigate(
        self, model: FrozenProbe, triggers: ReversedTriggers, clean: Dataset, seed: Seed, checkpoint: Path | None
    ) -> History:
        """Purify encoder and head in place; modes and flags are put right by the caller."""
