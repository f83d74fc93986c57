"""How far outside the clean encoders of the calibration half a score lies, and those scores as data."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cupel
from cupel.files import write_json
from cupel.scan.reference import BACKDOORED_Z, ENOUGH, robust_z
from cupel.zoo.entries import Entry

__all__ = ["THRESHOLD", "Calibration", "Group", "write_calibrations"]

THRESHOLD = -BACKDOORED_Z
"""Robust standard deviations above clean encoders from which an encoder counts as backdoored."""
_LEAST = 1e-6  # sizes of 0 have no logarithm
_FLOOR = 0.10  # least spread of scores without a bound, as a share of their median (our choice)

Level = Literal["recipe", "pool", "zoo"]


@dataclass(frozen=True)
class Group:
    """Clean encoders that a score is compared with.

    Args:
        level: What they have in common with the encoder: its recipe, its architecture and data, or only the zoo.
        scores: Theirs.
    """

    level: Level
    scores: tuple[float, ...]


class Calibration:
    """Scores of one scanner on the clean encoders of the calibration half.

    An encoder is compared with those of its own pre-training recipe where there are five or more, else with those of
    its architecture and data, else with all of its zoo. Clean encoders that were fine-tuned are compared, but nothing
    is compared with them.

    Args:
        scanner: Name.
        entries: Of any half; those of the test half are not looked at.

    Attributes:
        bounded: Whether 1 − score is a size in (0, 1], as DECREE's is: then its logarithm counts, as in a scan with
            references; else the score as it is, and a tenth of the median is the least spread.
    """

    def __init__(self, scanner: str, entries: Iterable[Entry]) -> None:
        known = [one for one in entries if one.half == "calibration" and scanner in one.scans]
        self.scanner = scanner
        self.clean = [one for one in known if not one.attacked and one.scans[scanner].verdict != "inconclusive"]
        self.bounded = all(0 <= one.scans[scanner].score <= 1 for one in known)

    def group(self, entry: Entry) -> Group | None:
        """The clean encoders that an encoder is compared with, never itself; None = there are too few."""
        others = [one for one in self.clean if (one.zoo, one.name) != (entry.zoo, entry.name)]
        near: list[tuple[Level, list[Entry]]] = [
            ("recipe", [one for one in others if one.recipe == entry.recipe]),
            ("pool", [one for one in others if one.pool == entry.pool]),
            ("zoo", [one for one in others if one.zoo == entry.zoo]),
        ]
        for level, found in near:
            if len(found) >= ENOUGH:
                return Group(level, tuple(one.scans[self.scanner].score for one in found))
        return None

    def z(self, entry: Entry) -> float | None:
        """Robust standard deviations that the entry's score lies above clean ones; None = nothing to compare with."""
        group = self.group(entry)
        if group is None or self.scanner not in entry.scans:
            return None
        score = entry.scans[self.scanner].score
        if self.bounded:
            return -robust_z(_size(score), [_size(one) for one in group.scores])
        return _linear_z(score, group.scores)

    def says(self, entry: Entry) -> bool | None:
        """Whether a scan with these calibrations calls the encoder backdoored; None = it was not scanned.

        As `cupel scan` does: where there are enough clean encoders of its recipe, by three robust standard deviations
        above them; else by the scanner's own thresholds.
        """
        if self.scanner not in entry.scans:
            return None
        group = self.group(entry)
        if group is None or group.level != "recipe":
            return entry.scans[self.scanner].verdict == "backdoored"
        z = self.z(entry)
        return z is not None and z > THRESHOLD

    def recipes(self) -> dict[str, list[Entry]]:
        """The clean encoders of each recipe of which there are enough to be shipped."""
        found: dict[str, list[Entry]] = {}
        for one in self.clean:
            found.setdefault(one.recipe, []).append(one)
        return {recipe: members for recipe, members in found.items() if len(members) >= ENOUGH}


def _size(score: float) -> float:
    return min(1.0, max(_LEAST, 1 - score))


def _linear_z(score: float, clean: Sequence[float]) -> float:
    middle = statistics.median(clean)
    spread = statistics.median(abs(one - middle) for one in clean)
    return (score - middle) / (1.4826 * max(spread, _FLOOR * abs(middle), 1e-9))


def write_calibrations(calibrations: Iterable[Calibration], folder: Path) -> list[Path]:
    """Write the clean scores of each recipe and scanner as `cupel.scan.read_reference` reads them.

    Args:
        calibrations: Those of scanners whose score has no bound are left out.
        folder: Made when needed.

    Returns:
        The files: `<scanner>-<zoo>-<start of the recipe's hash>.json`.
    """
    written = []
    for one in calibrations:
        for recipe, members in one.recipes().items() if one.bounded else ():
            first = members[0]
            path = folder / f"{one.scanner.replace('/', '-')}-{first.zoo}-{recipe[:8]}.json"
            half = f"{len(members)} encoders of the calibration half of {first.zoo}"
            note = {
                "scanner": one.scanner,
                "recipe": recipe,
                "architecture": first.architecture,
                "scores": [_size(member.scans[one.scanner].score) for member in members],
                "about": f"Sizes for clean encoders: {first.recipe_text}; {half}; cupel {cupel.__version__}",
            }
            write_json(path, note)
            written.append(path)
    return written
