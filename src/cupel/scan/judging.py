"""What scanners share beside their budgets: the check of what they are given, and how they say what they found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from cupel.cost import peak_memory_mib
from cupel.inference import device_of
from cupel.protocols import Encoder
from cupel.scan.admission import admit
from cupel.scan.budgeted import Budgeted
from cupel.scan.reference import Decision
from cupel.types import Dataset
from cupel.verdicts import Evidence, Verdict

__all__ = ["Judging"]


class Judging(Budgeted):
    """Base of scanners.

    Attributes:
        tested: The trigger families that are looked for, in words.
        limit: Threshold of a verdict that has no other.
    """

    tested: ClassVar[str]
    limit: ClassVar[float]

    def _tested(self) -> str:
        return self.tested

    def _limit(self) -> float:
        return self.limit

    def unfit(self, model: Encoder, clean: Dataset) -> Verdict | None:
        """`inconclusive` where nothing can be said about this model with these images; None = the scan may go on.

        Raises:
            CupelError: weights or embeddings are NaN or infinite.
            DataError: images of another size or scale.
        """
        why = admit(model, clean)
        return None if why is None else self.inconclusive(why, device_of(model.module))

    def inconclusive(
        self,
        why: str,
        device: torch.device,
        details: Mapping[str, float] | None = None,
        evidence: tuple[Evidence, ...] = (),
    ) -> Verdict:
        """Nothing can be said: score 0, as for a trigger as large as the image."""
        return Verdict(
            "inconclusive", 0.0, self._limit(), self._tested(), evidence, details or {}, why,
            peak_memory_mib=peak_memory_mib(device),
        )  # fmt: skip

    def concluded(
        self,
        said: Decision,
        score: float,
        evidence: tuple[Evidence, ...],
        details: Mapping[str, float],
        device: torch.device,
    ) -> Verdict:
        """A decision on a statistic in (0, 1], smaller = worse, as a verdict whose score is larger = worse."""
        z = {} if said.z is None else {"z": said.z}
        return Verdict(
            said.verdict, score, 1 - said.threshold, self._tested(), evidence, {**details, **z}, said.reason,
            said.false_alarm, peak_memory_mib(device), tuple(1 - one for one in said.clean),
        )  # fmt: skip
