"""What scanners say, what they found, and what they compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["ORDER", "Evidence", "Reference", "Verdict", "VerdictWord"]

VerdictWord = Literal["clean-by-test", "suspicious", "backdoored", "inconclusive"]
ORDER: tuple[VerdictWord, ...] = ("clean-by-test", "inconclusive", "suspicious", "backdoored")
"""From the best to the worst."""


@dataclass(frozen=True)
class Evidence:
    """A trigger that a scanner inverted.

    Args:
        mask: float32 `[height, width]` in [0, 1]; 1 = covered by the pattern.
        pattern: float32 `[3, height, width]` in [0, 1].
        size: Mean of the mask, in [0, 1] (DECREE's PL1-norm).
        converged: The inversion reached its goal.
        source: Method and start that found it.
        path: float32 `[steps, 2]`, size and reach (of the inversion's goal) of what was tried, step by step; None = not
            recorded.
    """

    mask: np.ndarray[Any, np.dtype[np.float32]]
    pattern: np.ndarray[Any, np.dtype[np.float32]]
    size: float
    converged: bool
    source: str
    path: np.ndarray[Any, np.dtype[np.float32]] | None = None


@dataclass(frozen=True)
class Reference:
    """Scores of one scanner on clean encoders of one recipe, made once and shipped or measured by the user.

    Args:
        scanner: Method and budget.
        recipe: What the encoders have in common.
        scores: One statistic per clean encoder (for DECREE its PL1-norm).
    """

    scanner: str
    recipe: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What a scanner says of one model. Larger score = worse, for every scanner.

    Args:
        verdict: Verdict word of the command line.
        score, threshold: In the same unit; at or above `threshold` = finding.
        tested: The trigger families that were looked for, in words.
        evidence: Inverted triggers.
        details: Numbers behind the score, and what it took: `forward_images` and `backward_images` where counted.
        reason: Why this verdict, in one sentence.
        false_alarm: Share of clean encoders that were called backdoored, with the number tried; None = not measured.
        peak_memory_mib: Most memory the process held until then; None = not measured. Unlike the rest it differs from
            run to run, so it counts in no comparison and is not in `to_json`.
        clean_scores: Those of the clean encoders it was compared with, in the unit of `score`; none = uncalibrated.
    """

    verdict: VerdictWord
    score: float
    threshold: float
    tested: str
    evidence: tuple[Evidence, ...] = ()
    details: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    false_alarm: tuple[float, int] | None = None
    peak_memory_mib: float | None = field(default=None, compare=False)
    clean_scores: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The plain values; arrays are left to the evidence files."""
        alarm = None if self.false_alarm is None else {"rate": self.false_alarm[0], "n": self.false_alarm[1]}
        return {
            "verdict": self.verdict,
            "score": self.score,
            "threshold": self.threshold,
            "tested": self.tested,
            "reason": self.reason,
            "details": dict(self.details),
            "false_alarm": alarm,
            "clean_scores": list(self.clean_scores),
            "evidence": [{"size": e.size, "converged": e.converged, "source": e.source} for e in self.evidence],
        }
